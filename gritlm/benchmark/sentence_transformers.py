"""sentence-transformers doing the same work, at each of its settings."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

from gritlm.benchmark.contestants import Work
from gritlm.benchmark.workload import TEMPERATURE, Task
from gritlm.models.chunks import to_device

STEP_SETTINGS = [{"mini_batch_size": size} for size in (1, 2, 4, 16)]
STEP_SETTINGS += [{"mini_batch_num_tokens": tokens} for tokens in (512, 8192)]
GPU_STEP_SETTINGS = [{"mini_batch_size": size} for size in (16, 64, 256)] + [{"mini_batch_num_tokens": 32768}]
ENCODE_SETTINGS = [{"batch_size": size} for size in (4, 8, 32, 128)]


def step(task: Task) -> Work:
    """The same batch through CachedMultipleNegativesRankingLoss, tokenisation included; a step a setting."""
    model = SentenceTransformer(str(task.folder / "served"), device=str(task.device))
    columns: list[list[str]] = [[] for _ in range(1 + task.group)]
    for dataset, row in task.plan.batch(0, 0).rows:
        record = task.records[row]
        _, draw = task.plan.draw(0, 0, dataset, row, 1, len(record.negatives), task.group - 1)
        texts = [record.query, record.positives[0], *(record.negatives[i] for i in draw)]
        for column, text in zip(columns, texts, strict=True):
            column.append(text.text)

    def step_with(loss: CachedMultipleNegativesRankingLoss) -> torch.Tensor:
        model.zero_grad()
        with task.autocast():
            value = loss([to_device(model.preprocess(column), task.device) for column in columns], None)
        value.backward()
        return value.detach()

    settings = GPU_STEP_SETTINGS if task.device.type == "cuda" else STEP_SETTINGS
    losses = [CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **options) for options in settings]
    names = [" ".join(map(str, *options.items())) for options in settings]
    return Work(model, {name: partial(step_with, loss) for name, loss in zip(names, losses, strict=True)}, task.device)


def encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    """`SentenceTransformer.encode` of a served folder, float32 (N, D) on the CPU."""
    model = SentenceTransformer(str(folder), device=str(device), model_kwargs={"dtype": dtype})

    def encode(texts: list[str], **options) -> torch.Tensor:
        return torch.from_numpy(model.encode(texts, **options)).float()

    return encode
