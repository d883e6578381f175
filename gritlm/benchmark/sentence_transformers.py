"""The baseline: sentence-transformers on the same workload, with several settings to choose from."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor

from gritlm.benchmark.contestants import Implementation, Step
from gritlm.benchmark.workload import TEMPERATURE, Workload
from gritlm.models.chunks import to_device

STEP_SETTINGS = [{"mini_batch_size": size} for size in (1, 2, 4, 16)]
STEP_SETTINGS += [{"mini_batch_num_tokens": tokens} for tokens in (512, 8192)]
GPU_STEP_SETTINGS = [{"mini_batch_size": size} for size in (16, 64, 256)] + [{"mini_batch_num_tokens": 32768}]
ENCODE_BATCH_SIZES = (4, 8, 32, 128)


def build_step(workload: Workload) -> Implementation:
    """CachedMultipleNegativesRankingLoss on the same batch, tokenisation included."""
    device = workload.device
    model = SentenceTransformer(str(workload.served), device=str(device))
    columns = columns_of_the_batch(workload)

    def step(loss: CachedMultipleNegativesRankingLoss) -> tuple[Tensor, Mapping[str, float]]:
        model.zero_grad()
        with workload.autocast():
            value = loss([to_device(model.preprocess(column), device) for column in columns], None)
        value.backward()
        return value.detach(), {}

    settings: dict[str, Step] = {}
    for options in GPU_STEP_SETTINGS if device.type == "cuda" else STEP_SETTINGS:
        loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **options)
        settings[" ".join(map(str, *options.items()))] = partial(step, loss)
    return Implementation(model, settings, device)


def columns_of_the_batch(workload: Workload) -> list[list[str]]:
    """The texts of the first batch: the queries, the positives, then each column of negatives."""
    rows = []
    for dataset, row in workload.plan.batch(0, 0).rows:
        record = workload.records[row]
        counts = len(record.positives), len(record.negatives)
        positive, negatives = workload.plan.draw(0, 0, dataset, row, *counts, workload.group - 1)
        rows.append([record.query, record.positives[positive], *(record.negatives[i] for i in negatives)])
    return [[text.text for text in column] for column in zip(*rows, strict=True)]


def load_encode(folder: Path, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """`SentenceTransformer.encode` of a model folder; it returns float32 (N, D) on the CPU."""
    model = SentenceTransformer(str(folder), device=str(device), model_kwargs={"dtype": dtype})

    def encode(texts: list[str], **options: Any) -> Tensor:
        return torch.from_numpy(model.encode(texts, **options)).float()

    return encode
