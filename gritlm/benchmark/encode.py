"""`gritlm benchmark encode`: texts per second of `GritLM.encode`, and of the baseline at each of its batch sizes."""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gritlm.benchmark.contestants import BASELINE
from gritlm.benchmark.workload import make_workload
from gritlm.gritlm import GritLM


def measure_encoding(args: argparse.Namespace) -> dict[str, Any]:
    """Encode the workload's positives with each contestant in turn, and compare the vectors with gritlm's."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    with make_workload(args) as workload:
        workload.save_served()
        texts = [text.text for row in range(len(workload.records)) for text in workload.records[row].positives]
        texts = texts[: 10 * args.queries]
        model = GritLM(workload.served, dtype=dtype, device=str(workload.device))
        encode = partial(model.encode, texts, chunk_tokens=args.chunk_tokens, convert_to_tensor=True)
        contestants: dict[str, Callable[[], Any]] = {"gritlm": encode}
        if args.compare:
            from gritlm.benchmark.sentence_transformers import ENCODE_BATCH_SIZES, load_encode

            encode_baseline = load_encode(workload.served, dtype, workload.device)
            for size in ENCODE_BATCH_SIZES:
                contestants[f"{BASELINE} batch_size {size}"] = partial(encode_baseline, texts, batch_size=size)
        ids = workload.text_tokenizer.tokenizer(texts, truncation=True, max_length=args.max_len).input_ids
    tokens = sum(map(len, ids))
    vectors, seconds = encode_in_turn(contestants, args.rounds)
    print(f"{args.model}, {len(texts)} texts, {tokens} tokens, {dtype}")
    figures: dict[str, Any] = {}
    for name in contestants:
        median = statistics.median(seconds[name])
        cosine = (vectors[name] * vectors["gritlm"]).sum(1).min().item()
        figures[name] = {"seconds": median, "texts_per_s": len(texts) / median, "min_cosine": cosine}
        print(
            f"  {name:42} {len(texts) / median:8.1f} texts/s  {tokens / median:8.0f} tokens/s  cosine >= {cosine:.6f}"
        )
    return figures


def encode_in_turn(
    contestants: dict[str, Callable[[], Tensor]], rounds: int
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Each contestant's vectors, and its seconds in each round after one to warm up."""
    vectors: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, encode in contestants.items():
            started = time.perf_counter()
            vectors[name] = encode()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return vectors, seconds
