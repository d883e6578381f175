"""`gritlm benchmark hrsa`: the sums of `gritlm hrsa` over synthetic states, streamed, and of all states in memory."""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gritlm.analysis.geometry import all_layers
from gritlm.analysis.representation import cka, correlations
from gritlm.analysis.sums import Sums
from gritlm.benchmark.workload import measure, memory_in_use
from gritlm.errors import UserError

PART = 4096  # tokens of a batch, as in `gritlm hrsa` on a CPU


def measure_hrsa(args: argparse.Namespace) -> dict[str, Any]:
    """Time the sums of each layer over --tokens, of all layers x all over --sample, and held states of --sample."""
    if args.sample < PART or args.tokens < PART:
        raise UserError(f"wanted --tokens and --sample of {PART} or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"states of two models, {args.layers} layers x {args.width}, float32")
    held = args.layers * args.width * 8 / 1e9  # GB a token, of both models
    found: dict[str, Any] = {}
    found["streamed"] = _line(f"same layers, streamed, {args.tokens} tokens", device, lambda: _streamed(args, device))
    with TemporaryDirectory() as folder:
        a, b = (_on_disk(Path(folder) / side, args, seed) for seed, side in enumerate("ab"))
        said = f"all layers x all, {args.sample} tokens on disk"
        found["all"] = _line(said, device, lambda: all_layers(a, b, device, torch.float32))
    found["held"] = _line(f"same layers, held, {args.sample} tokens", device, lambda: _held(args, device))
    print(f"  the states alone of {args.tokens} tokens, held: {held * args.tokens:.1f} GB")
    return found


def _line(name: str, device: torch.device, work: Callable[[], Any]) -> dict[str, float]:
    before = memory_in_use(device)
    _, seconds, peak = measure(work, device)
    print(f"  {name}: {seconds:.1f} s, peak +{(peak - before) / 1e9:.2f} GB", flush=True)
    return {"seconds": seconds, "peak_gb": (peak - before) / 1e9}


def _states(width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of states, and the same with noise."""
    x_TD = torch.randn(PART, width, generator=generator)
    return x_TD, x_TD + torch.randn(PART, width, generator=generator)


def _streamed(args: argparse.Namespace, device: torch.device) -> list[float | None]:
    x_TD, y_TD = (side.to(device) for side in _states(args.width, torch.Generator().manual_seed(0)))
    second_T, sums = torch.arange(PART, device=device) % 2 == 1, [Sums(torch.float32) for _ in range(args.layers)]
    for _ in range(args.tokens // PART):
        for of_layer in sums:
            of_layer.add(x_TD, y_TD, second_T)
    return [cka(of_layer) for of_layer in sums]


def _on_disk(path: Path, args: argparse.Namespace, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    states = np.lib.format.open_memmap(path, "w+", np.float32, (args.layers, args.sample, args.width))
    for layer in states:
        layer[:] = rng.standard_normal(layer.shape, np.float32)
    states.flush()
    return np.load(path, mmap_mode="r")


def _held(args: argparse.Namespace, device: torch.device) -> list[tuple[float | None, Tensor]]:
    """All states of both models in memory, then each layer in one piece."""
    generator, parts = torch.Generator().manual_seed(0), -(-args.sample // PART)
    layers = []
    for _ in range(args.layers):
        sides = zip(*(_states(args.width, generator) for _ in range(parts)), strict=True)
        layers.append([torch.cat(side)[: args.sample].to(device) for side in sides])
    second_T = torch.arange(args.sample, device=device) % 2 == 1
    sums = [Sums(torch.float32).add(x_TD, y_TD, second_T) for x_TD, y_TD in layers]
    return [(cka(of_layer), correlations(of_layer)) for of_layer in sums]
