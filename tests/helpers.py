"""Shared by the tests: data, batches, real gloo ranks, and runs of the command line."""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gritlm.data.batch_plan import Plan
from gritlm.data.batches import BatchBuilder
from gritlm.data.no_repeats import RowTexts
from gritlm.data.records import load_records
from gritlm.distributed import destroy_process_group
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.chunks import ChunkConfig
from gritlm.models.embedder import Embedder
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
# DeepSpeed compiles its CPU communication at first use.
NEEDS_A_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for torch.compile")
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None and shutil.which("g++") is not None
INSTRUCTION = "Instruct: Find the answer\nQuery: "
WORDS = (  # noqa: SIM905
    "Instruct Find the answer Query river stone quiet engine copper lantern walks under seven bridges while snow falls "
    "over market harbour violet thread measure orchard signal paper winter candle mirror garden distant thunder"
).split()


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def write_jsonl(path: Path, rows: int, negatives: int, seed: int, longest: int = 40) -> None:
    """Rows of very unequal lengths; one text in six stands in several rows, one query in ten as well."""
    rng = random.Random(seed)
    common = [words(rng, 3, 12) for _ in range(4)]
    with open(path, "w") as out:
        for number in range(rows):
            query = common[number % 4] if number % 10 == 0 else words(rng, 1, 10)
            positive = common[number % 4] if number % 6 == 0 else words(rng, 1, longest)
            row = {
                "query": [INSTRUCTION, query],
                "pos": [positive, words(rng, 2, 8)],
                "neg": [words(rng, 1, longest) for _ in range(rng.randint(0, negatives) if negatives else 0)],
            }
            out.write(json.dumps(row) + "\n")


def make_builder(
    model: Path,
    data: Path,
    cache: Path,
    batch: int = 8,
    group: int = 3,
    chunk_tokens: int = 64,
    rank=0,
    ranks=1,
    packed: bool = True,
    deduplicate: bool = True,
    **text,
) -> BatchBuilder:
    records = load_records(data, cache)
    contract = TextContract(query_max_len=32, passage_max_len=48, **text)
    text_tokenizer = TextTokenizer(load_tokenizer(str(model), contract), contract)
    documents = RowTexts.concatenate([r.documents for r in records])
    plan = Plan([r.name for r in records], list(map(len, records)), batch, seed=3, documents=documents)
    return BatchBuilder(
        plan, records, text_tokenizer, group, ChunkConfig(chunk_tokens, packed, deduplicate), rank, ranks
    )


def make_embedder(model: Path, **options) -> Embedder:
    config = load_config(str(model), "bb")
    return Embedder(load_backbone(str(model), config), **options)


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def flat_weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ---- real ranks


def _rank_main(rank: int, ranks: int, folder: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    try:
        torch.save(function(*args), f"{folder}/{rank}.pt")
    finally:
        destroy_process_group()


def run_ranks(function: Callable, *args, ranks: int = 2) -> list:
    """`function(*args)` on real gloo ranks; what each returned, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank_main, (ranks, folder, function, args), nprocs=ranks)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(ranks)]


# ---- the command line


def train_flags(model: Path, data: Path, out: Path, cache: Path, **more) -> list[str]:
    flags = {
        "model_name_or_path": model,
        "train_data": data,
        "output_dir": out,
        "data_cache": cache,
        "global_batch_size": 8,
        "train_group_size": 3,
        "query_max_len": 32,
        "passage_max_len": 48,
        "chunk_tokens": 128,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
    } | more
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def run(*command: str, ranks: int = 1, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """A Python command (`-m module ...` or a script) as a user runs it, under torchrun where ranks > 1."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    return subprocess.run(
        [*launcher, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def train(*flags: str, ranks: int = 1, **env: str) -> subprocess.CompletedProcess:
    done = run("-m", "gritlm", "train", *flags, ranks=ranks, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


DRIVER = ROOT / "tests" / "smoke" / "driver.py"


def batches_of(rows_file: Path, rank: int) -> list:
    """What the driver wrote: the data set and the rows of each step of a rank."""
    return [json.loads(line) for line in open(f"{rows_file}.{rank}")]


def losses(out: Path) -> list[float]:
    """The logged loss of every step of a finished run."""
    state = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])) / "trainer_state.json"
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
