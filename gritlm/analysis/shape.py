"""The shape of one model's space: intrinsic dimension, effective rank, anisotropy, uniformity, alignment."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gritlm.analysis.controls import BLOCKS, jackknife
from gritlm.analysis.geometry import BLOCK_ROWS, distinct
from gritlm.evaluation.space import SAMPLE, spread

OF_PAIRS = ("effective_rank", "anisotropy", "uniformity")  # of `gritlm.evaluation.space`
SHAPE = ("intrinsic_dimension", *OF_PAIRS, "alignment")
CANDIDATES = 8  # nearest by float32 products, of which the two nearest are found exactly
CENSORED = 0.1  # of the largest ratios, as in Facco et al.


def two_nn_ratios(rows_ND: Tensor, groups_N: Tensor) -> np.ndarray:
    """r2 / r1, float64 (N,): of the distances of a row's two nearest rows outside its group. NaN where not had."""
    rows = rows_ND - rows_ND.mean(0)  # the products below lose what a large mean takes
    ratios = []
    for start in range(0, len(rows), BLOCK_ROWS):
        part = rows[start : start + BLOCK_ROWS]
        distances = rows.square().sum(1) - 2 * part @ rows.T
        distances[groups_N[start : start + BLOCK_ROWS, None] == groups_N] = torch.inf
        values, places = distances.topk(min(CANDIDATES, len(rows)), dim=1, largest=False)
        exact = (part[:, None].double() - rows[places].double()).norm(dim=2).masked_fill(values == torch.inf, torch.inf)
        first, second = exact.sort(dim=1).values[:, :2].T
        ratios.append((second / first).masked_fill((first == 0) | second.isinf(), torch.nan))
    return torch.cat(ratios).cpu().numpy()


def two_nn(ratios: np.ndarray) -> float | None:
    """The intrinsic dimension (TwoNN; Facco et al., 2017): maximum likelihood, the largest ratios censored."""
    logs = np.log(np.sort(ratios[np.isfinite(ratios)]))
    kept = int(len(logs) * (1 - CENSORED))
    total = logs[:kept].sum() + (len(logs) - kept) * logs[kept - 1] if kept else 0.0
    return float(kept / total) if total > 0 else None


def alignment(unit_ND: np.ndarray, groups_N: np.ndarray) -> float | None:
    """E |x - x+|^2 over pairs of rows of one group (Wang & Isola, 2020). None where no group has two rows."""
    _, codes, counts = np.unique(groups_N, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), unit_ND.shape[1]))
    np.add.at(sums, codes, unit_ND)
    pairs = (counts * (counts - 1)).sum()
    return float(2 - 2 * ((sums**2).sum() - counts.sum()) / pairs) if pairs else None


def shape(
    rows_ND: np.ndarray,
    groups_N: np.ndarray,
    blocks_N: np.ndarray,
    positives_N: np.ndarray | None,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Each metric of `SHAPE` of the rows of one layer: value, low, high, and counts.

    Those of pairs take the first `SAMPLE` rows, of unit norm. Intervals leave out each block of documents in turn.

    Args:
        groups_N: the document of each row. blocks_N: its block.
        positives_N: rows of one number are positives of one another; None where there are none.
    """
    kept = distinct(rows_ND)
    rows, blocks = np.array(rows_ND[kept]), blocks_N[kept]
    about = {
        "value": None,
        "low": None,
        "high": None,
        "floor": None,
        "rows": len(kept),
        "equal": len(rows_ND) - len(kept),
    }
    found: dict[str, dict[str, Any]] = {name: dict(about) for name in SHAPE}
    if positives_N is None:
        found["alignment"]["why"] = "found no positives: of documents they are those of one label (--label_column)"
    if len(kept) < 3 * BLOCKS:
        return {name: row | {"why": f"found {len(kept)} rows that differ, wanted more"} for name, row in found.items()}
    unit = torch.nn.functional.normalize(torch.from_numpy(rows).double(), dim=1).numpy()
    ratios = two_nn_ratios(torch.from_numpy(rows).to(device), torch.from_numpy(groups_N[kept]).to(device))

    def measured(keep: np.ndarray) -> dict[str, float | None]:
        values = {"intrinsic_dimension": two_nn(ratios[keep]), **spread(unit[:SAMPLE][keep[:SAMPLE]])}
        return values | {"alignment": None if positives_N is None else alignment(unit[keep], positives_N[kept][keep])}

    values = measured(np.ones(len(kept), bool))
    left_out = [measured(blocks != block) for block in range(BLOCKS)]
    for name, row in found.items():
        row["value"] = values[name]
        row["low"], row["high"] = jackknife(values[name], [part[name] for part in left_out])
    for name in OF_PAIRS:
        found[name]["rows"] = min(SAMPLE, len(kept))
    return found
