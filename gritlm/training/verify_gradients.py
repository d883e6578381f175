"""Compare the gradient of many ranks, on any engine and in any chunks, with that of one process on the whole batch.

Random texts, float32, three SGD steps for each loss term. The loss, the gradient and the updated weights of each step
are compared, as a relative error in norm. With --temperatures they are compared with float64, and the error must be
like that of one process in float32. With --bf16 the engines compute under autocast, and the error of one step's
gradient must not grow with the number of chunks. Without --model_name_or_path the models are tiny ones of --families.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import math
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from gritlm.cli import exit_rank, quieten, run_verb
from gritlm.distributed import destroy_process_group, gather_objects, init_process_group, rank, world_size
from gritlm.errors import UserError
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.base import read_base
from gritlm.models.embedder import Embedder
from gritlm.models.families import FAMILIES, tiny_config
from gritlm.models.lora import make_config, match_targets
from gritlm.models.text import TextContract
from gritlm.training.arguments import ModelArguments, flag
from gritlm.training.compare_gradients import (
    HEADER,
    WHOLE_BATCH,
    Case,
    MakeObjective,
    compare,
    one_process_alone,
)
from gritlm.training.environment import abandoned_builds, refuse_environment
from gritlm.training.flag_parser import make_parser
from gritlm.training.objective import Objective
from gritlm.training.setup import settle
from gritlm.training.terms import OPTIONS, VARIANTS

ENGINES = ("plain", "ddp", "fsdp2", "zero1", "zero2", "zero3")
FEWEST_CHUNKS = 8  # with fewer texts, a query may have nothing to be contrasted with

EXAMPLES = """examples:
  gritlm verify-gradients --ranks 2
  gritlm verify-gradients --ranks 2 --temperatures 0.02 0.01
  gritlm verify-gradients --ranks 2 --lora
  gritlm verify-gradients --ranks 2 --bf16 --chunks 16 600
  gritlm verify-gradients --model_name_or_path Qwen/Qwen3-0.6B --ranks 8 --engines ddp fsdp2
  torchrun --nnodes 2 ... -m gritlm verify-gradients --model_name_or_path Qwen/Qwen3-0.6B      many nodes"""


@dataclass
class VerifyArguments:
    """What is compared."""

    ranks: int | None = flag(None, "Processes to start on this machine. None: one per GPU, or 2. Not under torchrun.")
    engines: list[str] | None = flag(None, "Some of plain ddp fsdp2 zero1 zero2 zero3. None: all installed.")
    terms: list[str] | None = flag(None, f"Some of {' '.join(VARIANTS)}. None: all; with --bf16 the first.")
    families: list[str] | None = flag(
        None, f"Without a model: tiny ones of these families, some of {' '.join(FAMILIES)}. None: qwen2 and qwen3."
    )
    num_layers: int | None = flag(2, "Use only the model's first layers; 0 for all.")
    queries: int = flag(4, "Queries on each rank. --bf16 takes half as many as chunks.")
    max_len: int = flag(64, "Longest text in tokens.")
    activation_memory: str = flag("0", "GB of activations kept between the two passes, as in training.")
    sync_each_chunk: bool = flag(False, "On fsdp2, zero2, zero3: sum the gradient over the ranks after each chunk.")
    lora: bool = flag(False, "Train a LoRA adapter on all linear layers.")
    torch_compile: bool = flag(False, "Compile the layers; not with zero1, zero2, zero3.")
    tolerance: float = flag(1e-5, "Largest relative error that counts as equal.")
    temperatures: list[float] | None = flag(None, "Temperatures to compare at, such as 0.02 and 0.01. None: 0.05.")
    bf16: bool = flag(False, "Compute under bfloat16 autocast, as in training.")
    chunks: list[int] | None = flag(None, "With --bf16: chunks on each rank, one text each. None: 16 and 600.")
    growth: float | None = flag(
        None,
        "With --bf16 or --temperatures: largest error that counts as equal, as a multiple of that of one process, in "
        "bfloat16 or float32, that encodes the whole batch at once. None: 2 or 3.",
    )

    def cases(self) -> Iterator[Case]:
        same = ("torch_compile", "activation_memory", "sync_each_chunk")
        more: dict[str, Any] = {name: getattr(self, name) for name in same}
        if self.bf16:
            for term in self.terms or [*VARIANTS][:1]:
                for chunks in self.chunks or (16, 600):
                    yield Case(term, False, -(-chunks // 2), self.max_len, 1, False, steps=1, bf16=True, **more)
            return
        for temperature, term in itertools.product(self.temperatures or (None,), self.terms or VARIANTS):
            # Hard negatives or none, many chunks or one: every pair for the first two terms, else each once.
            kinds = [(True, self.max_len), (False, WHOLE_BATCH)]
            if term in OPTIONS:  # without hard negatives, a mask may leave a small batch nothing to learn
                kinds = [(True, self.max_len), (True, WHOLE_BATCH)]
            elif term in [*VARIANTS][:2]:
                kinds += [(True, WHOLE_BATCH), (False, self.max_len)]
            for hard, tokens in kinds:
                yield Case(term, hard, self.queries, self.max_len, tokens, temperature=temperature, **more)


def measure_of(case: Case) -> Case:
    """The case that measures it: one process encodes the whole batch at once."""
    return dataclasses.replace(case, chunk_tokens=WHOLE_BATCH)


# ---- the verb


def available(compiled: bool) -> list[str]:
    engines = ["plain"] if world_size() == 1 else []
    engines += ["ddp", "fsdp2"]
    return engines + (["zero1", "zero2", "zero3"] if importlib.util.find_spec("deepspeed") and not compiled else [])


def parse(argv: list[str]) -> tuple[ModelArguments, VerifyArguments]:
    parser = make_parser("verify-gradients", (ModelArguments, VerifyArguments), EXAMPLES)
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    model_args, args = parser.parse_args_into_dataclasses(args=argv)
    refuse_environment(vars(args))
    model_args = settle(model_args, read_base(model_args.model_name_or_path))
    for flag_name, known in (("families", FAMILIES), ("terms", VARIANTS), ("engines", ENGINES)):
        for name in getattr(args, flag_name) or ():
            if name not in known:
                raise UserError(f"--{flag_name}: found {name!r}, wanted some of {', '.join(known)}")
    for engine in args.engines or ():
        if engine == "plain" and wanted_ranks(args) > 1:
            raise UserError("--engines plain: wanted --ranks 1, one process alone")
        if engine.startswith("zero") and args.torch_compile:
            raise UserError(f"--torch_compile with --engines {engine}: not supported")
        if engine.startswith("zero") and not importlib.util.find_spec("deepspeed"):
            raise UserError(f"--engines {engine}: DeepSpeed is not installed (pip install deepspeed)")
    if args.temperatures and args.bf16:
        raise UserError("--temperatures with --bf16: not supported; give one of the two")
    for temperature in args.temperatures or ():
        if not 0 < temperature < math.inf:
            raise UserError(f"--temperatures: found {temperature}, wanted numbers above 0")
    for chunks in args.chunks or ():
        if chunks < FEWEST_CHUNKS:
            raise UserError(f"--chunks: found {chunks}, wanted {FEWEST_CHUNKS} or more")
    return model_args, args


def wanted_ranks(args: VerifyArguments) -> int:
    return int(os.environ.get("WORLD_SIZE") or args.ranks or torch.cuda.device_count() or 2)


def configs_of(
    model_args: ModelArguments, num_layers: int | None, families: list[str] | None
) -> dict[str, PreTrainedConfig]:
    """Name -> config of each model to compare on, cut to its first layers."""
    if name := model_args.model_name_or_path:
        config = load_config(name, model_args.attn, model_args.trust_remote_code)
        config.num_hidden_layers = num_layers or config.num_hidden_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        return {name: config}
    return {f"tiny {name}": tiny_config(name, model_args.attn == "cc") for name in families or ("qwen2", "qwen3")}


def main(argv: list[str], make_objective: MakeObjective = Objective) -> int:
    model_args, args = parse(argv)
    configs_of(model_args, args.num_layers, args.families)
    if "RANK" in os.environ:  # under torchrun
        return int(verify(model_args, args, make_objective) > 0)
    ranks = wanted_ranks(args)
    if any(name.startswith("zero") for name in args.engines or available(args.torch_compile)):
        for line in abandoned_builds():
            print(line, file=sys.stderr)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = torch.multiprocessing.get_context("spawn").Value("i", 0)
    torch.multiprocessing.spawn(_rank_main, (ranks, port, argv, code), nprocs=ranks)
    return code.value


def _rank_main(index: int, ranks: int, port: int, argv: list[str], code: Any) -> None:
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    code.value = run_verb(lambda argv: int(verify(*parse(argv), Objective) > 0), argv)
    exit_rank(0)


def verify(model_args: ModelArguments, args: VerifyArguments, make_objective: MakeObjective) -> int:
    """Print the table, one line as each cell is done. Returns the number of wrong cells. All ranks call it."""
    quieten()
    device = init_process_group()
    cells, wrong, growth = 0, 0, args.growth or (2.0 if args.bf16 else 3.0)

    def show(line: str) -> None:
        if rank() == 0:
            print(line, flush=True)

    for name, config in configs_of(model_args, args.num_layers, args.families).items():

        def build(name: str = name, config: PreTrainedConfig = config) -> Embedder:
            torch.manual_seed(0)
            reset = model_args.reset_weight or not model_args.model_name_or_path
            backbone = load_backbone(name, config, model_args.attn_implementation, reset)
            contract = TextContract(pooling_method=model_args.pooling_method, normalized=model_args.normalized)
            embedder = Embedder(backbone, contract, model_args.projection)
            if args.lora:
                endings = match_targets(config, None)
                embedder.add_adapter(make_config(4, 8, 0.0, endings))
                for weight_name, weight in embedder.named_parameters():
                    if ".lora_B." in weight_name:  # 0 would leave lora_A without a gradient
                        torch.nn.init.normal_(weight, std=0.1)
            return embedder

        show(f"{name}{', LoRA' * args.lora}\n{HEADER}")
        alone = list(dict.fromkeys(map(measure_of, args.cases() if args.bf16 or args.temperatures else ())))
        own = [one_process_alone(build, case, device) for case in alone[rank() :: world_size()]]  # each rank a share
        measures = {cell.case: cell for cells_of_rank in gather_objects(own) for cell in cells_of_rank}
        for case in alone:
            show(measures[case].line("the measure"))
        for engine in args.engines or available(args.torch_compile):
            for case in args.cases():
                cell = compare(build, engine, case, device, make_objective)
                over = cell.over(measures[measure_of(case)]) if measures else 0.0
                equal = over <= growth if measures else max(cell.errors) <= args.tolerance
                cells, wrong = cells + 1, wrong + (not equal)
                times = f"{over:.1f}x at {case.flags.temperature:g}  " if measures else ""
                show(cell.line(times + ("ok" if equal else "WRONG")))
    said = f"have at most {growth:g} times the error of one process" if measures else ""
    show(f"{cells - wrong} of {cells} {said or f'equal one process to {args.tolerance:g}'}")
    destroy_process_group()
    return wrong
