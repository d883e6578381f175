"""`gritlm benchmark step`: the variants of gritlm's training step, and the baseline's, timed in turn."""

import argparse
import itertools
import statistics
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import torch

from gritlm.benchmark.contestants import (
    BASELINE,
    Build,
    Contestant,
    GritLMStep,
    choose_fastest,
    gradient_difference,
    save_gradient,
    time_step,
)
from gritlm.benchmark.workload import Workload, make_workload, matrix_rate, useful_flops
from gritlm.models.chunks import ChunkConfig

AT_ONCE = 6


def measure_step(args: argparse.Namespace) -> dict[str, Any]:
    """Time each combination of gritlm's settings, and the baseline. All are compared with the first.

    They take turns in groups of at most `AT_ONCE`, which each have the first, since every contestant holds its process.
    """
    settings = itertools.product(args.attn_implementation, args.activation_memory, args.torch_compile, args.terms)
    steps = [
        GritLMStep(attn, memory, args.chunk_tokens, checkpointing, compiled == "yes", term)
        for (attn, memory, compiled, term), checkpointing in itertools.product(settings, args.checkpointing)
    ]
    other_losses = {str(step) for step in steps if step.term != steps[0].term}
    builds: dict[str, Build] = {str(step): step.build for step in steps}
    with make_workload(args) as workload:
        if args.compare:
            from gritlm.benchmark.sentence_transformers import build_step

            workload.save_served()
            builds[BASELINE] = build_step
        first, *others = builds.items()
        groups = [[first, *others[start : start + AT_ONCE - 1]] for start in range(0, len(others) or 1, AT_ONCE - 1)]
        reports = [measure_group(dict(group), other_losses, workload, args) for group in groups]
    contestants: dict[str, Any] = {}
    for found in reports:  # the first contestant is in every group: its figures come from the first one
        contestants |= {name: figures for name, figures in found["contestants"].items() if name not in contestants}
    return reports[0] | {"contestants": contestants}


def measure_group(
    builds: dict[str, Build], other_losses: set[str], workload: Workload, args: argparse.Namespace
) -> dict[str, Any]:
    """Time contestants in turn.

    Args:
        other_losses: names of those whose gradient is not the first's.
    """
    with ExitStack() as stack:
        contestants = [stack.enter_context(closing(Contestant(*item, workload))) for item in builds.items()]
        for contestant in contestants:
            contestant.wait_until_built()
        if BASELINE in builds:
            choose_baseline_setting(contestants[-1])
        rate = time_in_turn(contestants, workload, args.rounds)
        compare_gradients([c for c in contestants if c.name not in other_losses], workload)
        return report(contestants, workload, rate, args)


def choose_baseline_setting(baseline: Contestant) -> None:
    best, seconds = baseline.ask(choose_fastest)
    print(f"{baseline.name}, one step each: {', '.join(f'{name} {taken:.1f} s' for name, taken in seconds.items())}")
    baseline.name += f" {best}"


def time_in_turn(contestants: list[Contestant], workload: Workload, rounds: int) -> float:
    """Fill the contestants' timings, one step each per round. Returns the median FLOP/s of a matrix product."""
    for contestant in contestants:  # with activation_memory auto the first step keeps nothing
        contestant.ask(time_step)
    rates = []
    for number in range(rounds + 1):  # round 0 warms up
        rates.append(matrix_rate(workload.device, workload.bf16))
        for contestant in contestants:
            timing = contestant.ask(time_step)
            if number:
                contestant.timings.append(timing)
    return statistics.median(rates)


def compare_gradients(contestants: list[Contestant], workload: Workload) -> None:
    first, *others = contestants
    file = workload.folder / "gradient"
    first.ask(save_gradient, file)
    for contestant in others:
        contestant.gradient_difference = contestant.ask(gradient_difference, file)


def report(contestants: list[Contestant], workload: Workload, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """Print one line per contestant, and return the same figures."""
    batch = workload.builder(ChunkConfig(args.chunk_tokens, deduplicate=False))[0, 0]
    lengths = torch.cat([chunk["lengths"] for chunk in batch.chunks]).numpy()
    flops = useful_flops(workload.config(), lengths)
    print(
        f"{args.model}, {args.queries} queries x {args.group} passages, {len(lengths)} texts, {lengths.sum()} tokens "
        f"(median {np.median(lengths):.0f}, longest {lengths.max()}); matrix products run at {rate / 1e9:.0f} GFLOP/s: "
        f"at least {flops / rate:.2f} s per step"
    )
    first, *_ = contestants
    all_figures = {}
    for contestant in contestants:
        median = statistics.median(timing.seconds for timing in contestant.timings)
        parts = {
            part: statistics.median(timing.parts[part] for timing in contestant.timings)
            for part in contestant.timings[0].parts
        }
        figures = {
            "s_per_step": median,
            "tokens_per_s": int(lengths.sum() / median),
            "pairs_per_s": args.queries / median,
            "mfu": flops / median / rate,
            "peak_above_model_gb": max(timing.peak for timing in contestant.timings) / 1e9,
            "loss": contestant.timings[-1].loss,
            "parts": parts,
        }
        line = (
            f"  {contestant.name:48} {median:7.2f} s/step  {figures['tokens_per_s']:8d} tokens/s  "
            f"MFU {figures['mfu']:4.0%}  peak +{figures['peak_above_model_gb']:.2f} GB  loss {figures['loss']:.6f}"
        )
        if contestant is not first:
            pairs = zip(contestant.timings, first.timings, strict=True)
            figures["time_over_first"] = statistics.median(own.seconds / other.seconds for own, other in pairs)
            line += f"  {figures['time_over_first']:.2f}x the first's time"
            if contestant.gradient_difference is not None:
                figures["gradient_difference"] = contestant.gradient_difference
                line += f", gradients differ by {contestant.gradient_difference:.1e}"
        print(line)
        if parts:
            print("    " + ", ".join(f"{part} {taken:.2f} s" for part, taken in parts.items()))
        all_figures[contestant.name] = figures
    return {"limit_s": flops / rate, "contestants": all_figures}
