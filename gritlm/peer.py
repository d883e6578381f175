"""sentence-transformers doing the same work, at each of its settings."""

from collections.abc import Callable
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

from gritlm.data.collator import to_device
from gritlm.measure import TEMPERATURE, Side, Task

STEP_SETTINGS = [{"mini_batch_size": size} for size in (1, 2, 4, 16)]
STEP_SETTINGS += [{"mini_batch_num_tokens": tokens} for tokens in (512, 8192)]
GPU_STEP_SETTINGS = [{"mini_batch_size": size} for size in (16, 64, 256)] + [{"mini_batch_num_tokens": 32768}]
ENCODE_SETTINGS = [{"batch_size": size} for size in (4, 8, 32, 128)]


def step_side(task: Task, **options) -> Side:
    """The same batch through CachedMultipleNegativesRankingLoss, tokenisation included."""
    model = SentenceTransformer(str(task.folder / "served"), device=str(task.device))
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **options)
    columns: list[list[str]] = [[] for _ in range(1 + task.group)]
    for dataset, row in task.plan.batch(0, 0).rows:
        record = task.records[row]
        _, draw = task.plan.draw(0, 0, dataset, row, 1, len(record.negatives), task.group - 1)
        texts = [record.query, record.positives[0], *(record.negatives[i] for i in draw)]
        for column, text in zip(columns, texts, strict=True):
            column.append(text.text)

    def step() -> torch.Tensor:
        model.zero_grad()
        with task.autocast():
            value = loss([to_device(model.preprocess(column), task.device) for column in columns], None)
        value.backward()
        return value.detach()

    return Side(model, step)


def encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    """`SentenceTransformer.encode` of a served folder, float32 (N, D) on the CPU."""
    model = SentenceTransformer(str(folder), device=str(device), model_kwargs={"dtype": dtype})

    def encode(texts: list[str], **options) -> torch.Tensor:
        return torch.from_numpy(model.encode(texts, **options)).float()

    return encode
