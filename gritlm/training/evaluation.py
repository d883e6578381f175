"""Evaluate a model while it is trained, on all ranks: each encodes its share of the texts, all get all vectors.

Nothing here draws from a global random generator, so a run learns the same with and without evaluations.
"""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gritlm.data.batches import BatchBuilder, ContrastiveBatch
from gritlm.distributed import all_ranks, gather_objects, rank
from gritlm.evaluation.measure import measure
from gritlm.evaluation.results import read_results, write_results
from gritlm.evaluation.sets import SetResult
from gritlm.evaluation.verdict import compare
from gritlm.models.chunks import ChunkConfig, to_device
from gritlm.models.tokenizer import Tokens
from gritlm.training.evaluation_data import LOSS, MEAN, EvaluationData
from gritlm.training.objective import Objective
from gritlm.training.sharded_encoder import ShardedEncoder

FOLDER = "evaluation"  # in the output folder: the results of each evaluation
SHOWN = 6  # sets in a log line, at most


@dataclass
class HeldOutBatch:
    """Held-out rows as one batch of a single process: the tokens of its texts, in the order of their vectors."""

    tokens: list[Tokens]
    contrastive: ContrastiveBatch
    rows: int


class RunEvaluation:
    """Evaluates the model of a run, and keeps the results in its output folder.

    Args:
        builder: builds the run's batches, and so those of the held-out rows.
        objective: the run's loss, as a single process sees it.
        about: what the results file says of the model.
    """

    def __init__(
        self, data: EvaluationData, builder: BatchBuilder, objective: Objective, folder: Path, about: dict[str, Any]
    ):
        self.data, self.objective, self.folder, self.about = data, objective, folder, about
        self.builder = copy.copy(builder)
        self.builder.chunking, self.builder.teacher = ChunkConfig(1), None  # a chunk for each text
        self.loss_batches: list[HeldOutBatch] | None = None

    @torch.no_grad()
    def __call__(self, encode: ShardedEncoder, step: int, mark: Callable[[str], None]) -> tuple[dict[str, float], str]:
        """Evaluate, write the results, and return the numbers for the log, and the main ones in words.

        All ranks must call it; all get the first rank's numbers, so that they decide together when to stop. `mark` is
        called with what is evaluated next.
        """
        results = []
        for data in self.data.sets:
            mark(data.name)
            results.append(measure(data, encode, all_ranks()))
        numbers = {MEAN: float(np.mean([result.metrics[result.main] for result in results]))}
        if self.data.loss_batches:
            mark("the loss of held-out rows")
            numbers[LOSS] = self._loss(encode)
        for result in results:
            values = result.metrics | result.space
            numbers |= {f"eval_{result.name}_{key}": value for key, value in values.items() if isinstance(value, float)}
        if rank() == 0:
            write_results(results_file(self.folder, step), results, self.about | {"step": step} | numbers)
        return gather_objects((numbers, _summary(results, numbers)))[0]

    def _loss(self, encode: ShardedEncoder) -> float:
        """The mean loss of the held-out rows."""
        if self.loss_batches is None:
            self.loss_batches = [self._build(rows) for rows in self.data.loss_batches]
        total, rows = 0.0, 0
        for batch in self.loss_batches:
            vectors_TD = encode.vectors(len(batch.tokens), lambda own, b=batch: [b.tokens[i] for i in own])  # type: ignore[misc]
            contrastive = ContrastiveBatch(**to_device(vars(batch.contrastive), encode.device))
            terms = self.objective(vectors_TD, contrastive)
            total += batch.rows * sum(share.item() for share in terms.values())
            rows += batch.rows
        return total / rows

    def _build(self, rows: list[tuple[int, int]]) -> HeldOutBatch:
        batch = self.builder.build(rows, "", epoch=0, step=0)
        tokens = [Tokens(chunk["input_ids"].tolist(), int(chunk["prompt_lengths"])) for chunk in batch.chunks]
        return HeldOutBatch(tokens, batch.contrastive, len(rows))


def _summary(results: list[SetResult], numbers: dict[str, float]) -> str:
    parts = [f"mean {numbers[MEAN]:.4f}"] if len(results) > 1 else []
    parts += [f"{result.name} {result.main} {result.metrics[result.main]:.4f}" for result in results[:SHOWN]]
    parts += [f"and {len(results) - SHOWN} sets more"] if results[SHOWN:] else []
    return "  ".join([*parts, *([f"loss {numbers[LOSS]:.4f}"] if LOSS in numbers else [])])


# ---- results in the output folder


def results_file(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"step-{step}.json"


def steps_with_results(folder: Path) -> list[int]:
    found = (path.stem.removeprefix("step-") for path in (folder / FOLDER).glob("step-*.json"))
    return sorted(int(step) for step in found if step.isdigit())


def keep_results(folder: Path, step: int, source: Path) -> None:
    """Keep the results of the steps up to one, of which `source` may have some; the run takes the others again."""
    for number in steps_with_results(source):
        if number <= step and not results_file(folder, number).is_file():
            results_file(folder, number).parent.mkdir(exist_ok=True)
            shutil.copyfile(results_file(source, number), results_file(folder, number))
    for number in steps_with_results(folder):
        if number > step:
            results_file(folder, number).unlink()


def verdict(folder: Path, step: int) -> dict[str, Any]:
    """The base against the model of a step, for run.json: its line, and why a set is not in it."""
    missing = [number for number in (0, step) if not results_file(folder, number).is_file()]
    if missing:
        which = "the base was" if missing[0] == 0 else f"step {step} was"
        return {"verdict": f"none: {which} not evaluated by this run"}
    base, tuned = (read_results(results_file(folder, number)).sets for number in (0, step))
    common = [(old, new) for old in base for new in tuned if old.name == new.name and old.ids == new.ids]
    if not common:
        return {"verdict": "none: the base was evaluated on other sets"}
    found = compare([old for old, _ in common], [new for _, new in common])
    left_out = len({result.name for result in [*base, *tuned]}) - len(common)
    more = f"; {left_out} sets left out, that only one of them was evaluated on" if left_out else ""
    return {"verdict": found.line() + more, "base": 0, "step": step}
