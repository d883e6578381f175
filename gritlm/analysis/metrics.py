"""The metrics of `gritlm hrsa`, and the jobs that compute them for one pair of models from their states.

A job is what a restart skips. It gives, by metric and comparison, rows of layers and what else a figure shows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from gritlm.analysis.controls import BLOCKS, jackknife, mean_interval
from gritlm.analysis.function import probe
from gritlm.analysis.geometry import Neighbours, all_layers, cka_p_value
from gritlm.analysis.representation import EDGES, measure
from gritlm.analysis.shape import SHAPE, shape
from gritlm.analysis.states import Spool
from gritlm.analysis.sums import Sums
from gritlm.analysis.texts import MOST_LABELS

ROWS = 20_000  # of which neighbours are searched, and probes fitted, at most
POOLED, PAIR, SHUFFLED = "pooled", "pair", "shuffled"
FLOORS = ("unrelated", "random")  # comparisons without intervals
NO_LABELS = "--label_column was not given, and this metric needs labels"


class Metric(NamedTuple):
    level: str
    unit_of_analysis: str  # tokens where the tokenizers are one; pooled vectors are documents always
    title: str
    about: str


REPRESENTATION, GEOMETRY, SHAPES = ("representation", "tokens"), ("geometry", "documents"), ("shape", "tokens")
METRICS = {
    "correlation": Metric(*REPRESENTATION, "Correlation", "Mean correlation of a dimension in both models."),
    "h_inv": Metric(*REPRESENTATION, "H_inv", "How near the best rotation of A onto B is to a permutation."),
    "residual": Metric(*REPRESENTATION, "Residual", "Share of B's variance that rotating A leaves; held-out texts."),
    "mapped_cosine": Metric(
        *REPRESENTATION, "Mapped cosine", "Cosine of A's states, rotated, with B's; held-out texts."
    ),
    "sparsity": Metric(*REPRESENTATION, "Sparsity", "Hoyer sparsity of the rows of the best rotation."),
    "cka": Metric("geometry", "tokens", "CKA, unbiased", "Linear CKA, estimated without bias: 0 of unrelated states."),
    "cka_biased": Metric("geometry", "tokens", "CKA, biased", "Linear CKA, as usual: above 0 of unrelated states."),
    "knn_tokens": Metric("geometry", "tokens", "Token neighbours", "Jaccard of the k nearest tokens of other texts."),
    "knn_documents": Metric(*GEOMETRY, "Document neighbours", "Jaccard overlap of the k nearest documents."),
    "knn_mutual_documents": Metric(*GEOMETRY, "Mutual neighbours", "Share of the k nearest documents in common."),
    "knn_labels": Metric(*GEOMETRY, "Neighbours by label", "Jaccard of the k nearest documents, mean over labels."),
    "probe": Metric("function", "documents", "Probe", "Score on B of a linear probe that was fitted on A and frozen."),
    "intrinsic_dimension": Metric(*SHAPES, "Intrinsic dimension", "TwoNN: the dimension of a model's states."),
    "effective_rank": Metric(*SHAPES, "Effective rank", "exp of the entropy of the singular values."),
    "anisotropy": Metric(*SHAPES, "Anisotropy", "Mean cosine of pairs: 1 where all have one direction."),
    "alignment": Metric(*SHAPES, "Alignment", "Mean squared distance in a text; of pooled vectors, in a label."),
    "uniformity": Metric(*SHAPES, "Uniformity", "log of the mean Gaussian potential of pairs: lower is more even."),
}
Body = dict[str, Any]
Found = dict[str, dict[str, Body]]  # by metric and comparison


@dataclass
class Pair:
    """Model a and another one, and what the jobs need of them.

    Attributes:
        key: of the comparison: pair, ceiling, unrelated, random, more:NAME.
        spools: the states of both. by_token: compare the tokens of both; else their documents.
        sums: by layer, over all tokens; empty where same layers are not compared by tokens.
        why: why same layers are not compared; None if they are.
        halves, blocks: by document.
    """

    key: str
    spools: tuple[Spool, Spool]
    by_token: bool
    sums: list[Sums]
    why: str | None
    labels: np.ndarray | None
    halves: np.ndarray
    blocks: np.ndarray
    ks: list[int]
    seed: int
    dtype: torch.dtype
    device: torch.device

    @property
    def classes(self) -> np.ndarray | None:
        """The labels where they name few classes."""
        few = self.labels is not None and self.labels.dtype.kind != "f" and len(np.unique(self.labels)) <= MOST_LABELS
        return self.labels if few else None

    def side(self, number: int, tokens: bool) -> Iterator[tuple[int | str, np.ndarray, np.ndarray]]:
        """Each layer of a model, and its pooled vectors: name, rows, the document of each row."""
        spool, documents = self.spools[number], np.arange(len(self.halves))
        if tokens and spool.tokens is not None and spool.positions is not None:
            yield from ((layer, rows, spool.positions.documents) for layer, rows in enumerate(spool.tokens))
        else:
            yield from ((layer, rows, documents) for layer, rows in enumerate(spool.documents))
        yield POOLED, spool.pooled, documents

    def layers(self, tokens: bool) -> Iterator[tuple[int | str, np.ndarray, np.ndarray, np.ndarray]]:
        """The same layer of both models: name, rows of a and b, the document of each row."""
        a, b = ([*self.side(number, tokens)][-1 if self.why else 0 :] for number in (0, 1))
        yield from ((layer, x, y, documents) for (layer, x, documents), (_, y, _) in zip(a, b, strict=True))

    def sample(self, count: int) -> np.ndarray:
        """At most `ROWS` of so many rows, drawn by the seed, in any order."""
        return np.random.default_rng(self.seed).permutation(count)[:ROWS]

    def shuffled(self, halves: np.ndarray) -> np.ndarray:
        """An order in which rows change places within their half of the documents."""
        order, rng = np.arange(len(halves)), np.random.default_rng(self.seed)
        for half in (halves, ~halves):
            order[half] = rng.permutation(order[half])
        return order


def _add(found: Found, name: str, key: str, row: dict[str, Any], why: str | None, k: str = "") -> Body:
    """Add the row of a layer, of a metric with a k to its series."""
    body = found.setdefault(name, {}).setdefault(key, {"why": why})
    (body.setdefault("series", {}).setdefault(k, []) if k else body.setdefault("layers", [])).append(row)
    return body


# ---- correlation, Procrustes, CKA


def _from_sums(pair: Pair) -> Found:
    found: Found = {}
    for layer, x, y, documents in pair.layers(pair.by_token):
        streamed = pair.sums[layer] if isinstance(layer, int) and pair.sums else None
        for key, metrics in _measure_layer(pair, x, y, documents, streamed).items():
            for name, row in metrics.items():
                counts = row.pop("histogram", None)
                body = _add(
                    found, name, key, {"layer": layer, "low": None, "high": None, "floor": None} | row, pair.why
                )
                if counts:
                    histogram = {"layer": layer, "edges": EDGES.tolist(), "counts": counts}
                    body.setdefault("histograms", []).append(histogram)
    if pair.key == PAIR:
        x_ND, y_NE = (torch.from_numpy(np.array(spool.pooled)).to(pair.device) for spool in pair.spools)
        found["cka"][PAIR]["p_value"] = cka_p_value(x_ND, y_NE, pair.seed)
    return found


def _measure_layer(pair: Pair, x: np.ndarray, y: np.ndarray, documents: np.ndarray, streamed: Sums | None) -> Found:
    """By comparison and metric the row of one layer."""
    halves, blocks = pair.halves[documents], pair.blocks[documents]
    x_TD, y_TE, second_T = (torch.from_numpy(np.array(side)).to(pair.device) for side in (x, y, halves))
    rows = x_TD, y_TE, second_T
    found = {pair.key: measure(streamed or Sums().add(*rows), rows)}
    if pair.key == PAIR:
        y_TE = y_TE[torch.from_numpy(pair.shuffled(halves)).to(pair.device)]
        shuffled = streamed.shuffled if streamed else Sums().add(x_TD, y_TE, second_T)
        found[SHUFFLED] = measure(shuffled, (x_TD, y_TE, second_T))
    left_out = []
    if pair.key not in FLOORS:
        whole = Sums(pair.dtype).add(*rows)
        for block in range(BLOCKS):
            own = torch.from_numpy(blocks == block).to(pair.device)
            kept = rows[0][~own], rows[1][~own], second_T[~own]
            left_out.append(measure(whole.without(*(side[own] for side in rows)), kept, detail=False))
    for key, metrics in found.items():
        cosines = metrics["mapped_cosine"].pop("cosines", None)
        if key == pair.key:
            for name, row in metrics.items():
                row["left_out"] = [part[name]["value"] for part in left_out]
                row["low"], row["high"] = jackknife(row["value"], row["left_out"])
        if cosines is not None:
            interval = mean_interval(cosines.cpu().numpy(), documents[halves], pair.seed)
            metrics["mapped_cosine"] |= {"low": interval[0], "high": interval[1], "rows": len(cosines)}
    return found


def _matrices(pair: Pair) -> Found:
    """All layers of a against all of b, as a body of the pair; or why not."""
    a, b = (spool.tokens if pair.by_token and spool.tokens is not None else spool.documents for spool in pair.spools)
    return {name: {PAIR: matrix} for name, matrix in all_layers(a, b, pair.device, pair.dtype).items()}


# ---- neighbours, probes, shape


def _neighbours(pair: Pair) -> Found:
    found: Found = {}
    for tokens in (True, False) if pair.by_token else (False,):
        for layer, x, y, documents in pair.layers(tokens):
            if tokens and layer == POOLED:
                continue
            kept = pair.sample(len(documents))
            one = Neighbours(x[kept], y[kept], documents[kept], pair.ks, pair.device)
            order = np.random.default_rng(pair.seed).permutation(len(one.kept))
            for key, own in {pair.key: one, **({SHUFFLED: one.shuffled(order)} if pair.key == PAIR else {})}.items():
                by_k = (
                    {"knn_tokens": own.by_k(layer, pair.seed)}
                    if tokens
                    else {
                        "knn_documents": own.by_k(layer, pair.seed),
                        "knn_mutual_documents": own.by_k(layer, pair.seed, mutual=True),
                    }
                )
                if not tokens and pair.classes is not None:
                    by_k["knn_labels"] = own.by_k(layer, pair.seed, labels=pair.classes[kept])
                for name, rows in by_k.items():
                    for k, row in rows.items():
                        _add(found, name, key, row, pair.why, k)
            if layer == POOLED and pair.key == PAIR:
                found["knn_documents"][PAIR]["p_value"] = one.p_value(pair.seed)
    many = f"found labels that are numbers or of more than {MOST_LABELS} kinds, wanted few"
    whys = {"knn_tokens": pair.why or "found unlike tokenizers: tokens have no partners"}
    whys["knn_labels"] = NO_LABELS if pair.labels is None else many
    return {name: {pair.key: {"why": why}} for name, why in whys.items()} | found


def _probe(pair: Pair) -> Found:
    if pair.labels is None:
        return {"probe": {pair.key: {"why": NO_LABELS}}}
    found: Found = {}
    for layer, x, y, documents in pair.layers(tokens=False):
        kept = np.sort(pair.sample(len(documents)))
        labels, halves, blocks = pair.labels[kept], pair.halves[kept], pair.blocks[kept]
        for key in (pair.key, SHUFFLED) if pair.key == PAIR else (pair.key,):
            own = y[kept][pair.shuffled(halves)] if key == SHUFFLED else y[kept]
            row = probe(x[kept], own, labels, halves, blocks, pair.seed)
            _add(found, "probe", key, {"layer": layer, "low": None, "high": None, "floor": None} | row, pair.why)
    return found


def _shape(pair: Pair) -> Found:
    """Of the other model; and of a, with the pair."""
    found: Found = {}
    for key, number in {"a": 0, "b": 1}.items() if pair.key == PAIR else ((pair.key, 1),):
        for layer, rows, documents in pair.side(number, pair.by_token):
            kept = pair.sample(len(documents))
            positives = documents if pair.by_token and layer != POOLED else pair.classes
            positives, own = None if positives is None else positives[kept], documents[kept]
            for name, row in shape(rows[kept], own, pair.blocks[own], positives, pair.device).items():
                _add(found, name, key, {"layer": layer} | row, None)
    return found


class Job(NamedTuple):
    run: Callable[[Pair], Found]
    metrics: tuple[str, ...]


JOBS = {
    "sums": Job(_from_sums, tuple(METRICS)[:7]),
    "neighbours": Job(_neighbours, tuple(METRICS)[7:11]),
    "probe": Job(_probe, ("probe",)),
    "shape": Job(_shape, SHAPE),
    "matrix": Job(_matrices, ()),  # of the pair alone; it adds to metrics of others
}
