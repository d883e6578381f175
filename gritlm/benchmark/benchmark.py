"""Measure the speed of a training step, of the loss alone or of encoding, and compare it with sentence-transformers.
Or count the memory of a chunk on a GPU (`memory`) or predict its time (`predict`), without a GPU. Or measure the sums
of `gritlm hrsa`.

No network is needed. The model has random weights, and the texts come from this machine's Python or from a file.
Contestants take turns, after a round to warm up. For a training step, each runs in its own process.
"""

import argparse
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import __version__ as transformers_version

from gritlm.benchmark.contestants import BASELINE, CHECKPOINTING, INFO_NCE
from gritlm.benchmark.encode import measure_encoding
from gritlm.benchmark.hrsa import measure_hrsa
from gritlm.benchmark.loss import measure_loss
from gritlm.benchmark.memory import measure_memory
from gritlm.benchmark.predict import measure_prediction
from gritlm.benchmark.step import measure_step
from gritlm.benchmark.workload import MODELS
from gritlm.cli import home_expanded, quieten, verb_parser
from gritlm.errors import UserError
from gritlm.files import write_text
from gritlm.training.environment import refuse_environment
from gritlm.training.terms import VARIANTS

MEASURES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "step": measure_step,
    "loss": measure_loss,
    "encode": measure_encoding,
    "memory": measure_memory,
    "predict": measure_prediction,
    "hrsa": measure_hrsa,
}
ATTENTION = ("packed", "sdpa", "eager", "flash_attention_2")
EXAMPLES = """examples:
  gritlm benchmark --compare sentence-transformers
  gritlm benchmark --attn_implementation packed sdpa --activation_memory 0 8 --rounds 3
  gritlm benchmark --model qwen3-0.6b --queries 2048 --bf16 --chunk_tokens 65536 --activation_memory 0 auto
  gritlm benchmark --lengths uniform:256 --compare sentence-transformers --json out.json
  gritlm benchmark --terms info_nce same_tower sigreg
  gritlm benchmark loss --queries 8192 --passages 32768 --width 256
  gritlm benchmark encode --compare sentence-transformers
  gritlm benchmark memory --model qwen3-4b --bf16 --chunk_tokens 16384
  gritlm benchmark memory --model qwen3-8b --bf16 --chunk_tokens 16384 --adapter qlora
  gritlm benchmark predict --model qwen3-0.6b --chunk_tokens 16384
  gritlm benchmark hrsa --layers 24 --width 1024 --tokens 1000000 --sample 20000"""


def auto_or_gb(text: str) -> str:
    if text != "auto" and not float(text) >= 0:
        raise ValueError
    return text


def parse(argv: list[str]) -> argparse.Namespace:
    parser = verb_parser("benchmark", __doc__, EXAMPLES)
    parser.add_argument("measure", nargs="?", choices=MEASURES, default="step", help="default: step")

    add = parser.add_argument_group("workload").add_argument
    add("--model", choices=MODELS, default="tiny", metavar="NAME", help=f"one of {', '.join(MODELS)}")
    lengths = "stdlib (default), uniform:TOKENS, or a file of rows"
    add("--lengths", type=home_expanded, default="stdlib", metavar="SOURCE", help=lengths)
    add("--queries", type=int, default=64, metavar="N", help="queries per step, default 64; encode: two texts each")
    add("--group", type=int, default=4, metavar="N", help="passages per query, default 4")
    add("--max_len", type=int, default=512, metavar="TOKENS", help="limit per text, default 512")
    add("--passages", type=int, metavar="N", help="loss: passages in all, default 4 per query")
    add("--width", type=int, default=256, metavar="N", help="loss, hrsa: width of a vector, default 256")
    add("--layers", type=int, default=24, metavar="N", help="hrsa: layers of each model, default 24")
    add("--tokens", type=int, default=100_000, metavar="N", help="hrsa: tokens that are streamed, default 100000")
    add("--sample", type=int, default=20_000, metavar="N", help="hrsa: tokens that are held, default 20000")

    add = parser.add_argument_group("gritlm's settings (several values make several contestants)").add_argument
    add("--attn_implementation", nargs="+", choices=ATTENTION, default=["packed"], help="default packed")
    memory = "auto or a number, default 0"
    add("--activation_memory", nargs="+", type=auto_or_gb, default=["0"], metavar="GB", help=memory)
    add("--torch_compile", nargs="+", choices=("no", "yes"), default=["no"], help="default no")
    terms = f"some of {', '.join(VARIANTS)}"
    add("--terms", nargs="+", choices=VARIANTS, default=[INFO_NCE], metavar="TERM", help=terms)
    add("--chunk_tokens", type=int, default=4096, metavar="TOKENS", help="in a chunk, default 4096")
    add("--checkpointing", nargs="+", choices=CHECKPOINTING, default=["none"], help="of a layer, default none")
    add("--bf16", action="store_true", help="autocast to bfloat16, the baseline too")
    adapter = "memory: of training an adapter of rank 16 on all linear layers"
    add("--adapter", choices=("lora", "qlora"), help=adapter)

    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds, default 5; medians count")
    parser.add_argument("--compare", choices=(BASELINE,), help="also measure this library, at its fastest setting")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args(argv)
    refuse_environment({"bf16": args.bf16, "torch_compile": "yes" in args.torch_compile})
    least = {"queries": 2, "group": 1, "rounds": 1, "max_len": 1, "width": 2, "layers": 1, "chunk_tokens": 1}
    for name, wanted in least.items():
        if (found := getattr(args, name)) < wanted:
            raise UserError(f"--{name}: found {found}, wanted at least {wanted}")
    if args.lengths.startswith("uniform:") and not re.fullmatch(r"uniform:[1-9]\d*", args.lengths):
        raise UserError(f"--lengths: found {args.lengths!r}, wanted a number of tokens such as uniform:256")
    if args.compare and args.measure == "step" and args.terms[0] != INFO_NCE:
        raise UserError(f"--compare {args.compare}: wanted {INFO_NCE} first in --terms, which is that library's loss")
    if args.adapter and args.measure != "memory":
        raise UserError(f"--adapter {args.adapter}: found the measure {args.measure}, wanted memory")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    quieten()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, transformers {transformers_version}, {device}, {platform.machine()}")
    report = MEASURES[args.measure](args)
    if args.json:
        report["arguments"] = {name: str(value) for name, value in vars(args).items()}
        write_text(args.json, json.dumps(report, indent=2) + "\n")
    return 0
