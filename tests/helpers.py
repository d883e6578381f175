"""Shared by the tests: data, batches, models, and the flags of a small run. Processes are in processes.py."""

import importlib.util
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from processes import ROOT, run

from gritlm.data.batch_plan import Plan
from gritlm.data.batches import BatchBuilder
from gritlm.data.no_repeats import RowTexts
from gritlm.data.records import load_records
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.chunks import ChunkConfig
from gritlm.models.embedder import Embedder
from gritlm.models.folder import save_model_folder
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer

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


def write_equal_after_the_cut(path: Path, rows: int = 24) -> None:
    """Rows of which many queries, positives and negatives are equal to others once `make_builder` has cut them."""
    rng = random.Random(4)
    starts = [words(rng, 60, 60) for _ in range(4)]
    with open(path, "w") as out:
        for number in range(rows):
            cut, whole = f"{starts[number % 4]} tail {number}", f"{words(rng, 1, 8)} {number}"
            row = {
                "query": [INSTRUCTION, cut if number % 3 == 0 else whole],
                "pos": [cut if number % 4 < 2 else f"whole {whole}"],
                "neg": [f"{starts[number % 3]} other {number}", words(rng, 3, 9)],
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
    row_texts = RowTexts.concatenate([r.row_texts for r in records])
    plan = Plan([r.name for r in records], list(map(len, records)), batch, seed=3, row_texts=row_texts)
    return BatchBuilder(
        plan, records, text_tokenizer, group, ChunkConfig(chunk_tokens, packed, deduplicate), rank, ranks
    )


def texts_of(chunks: list[dict]) -> list[tuple[list[int], int]]:
    """Token ids and prompt length of each text, in the order of the chunks' rows."""
    found = []
    for chunk in chunks:
        ids, lengths = chunk["input_ids"], chunk["lengths"].tolist()
        if "equal_length_runs" in chunk:
            assert [length for count, length in chunk["equal_length_runs"] for _ in range(count)] == lengths
            rows = ids.split(lengths)
        else:
            rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        found += [(row.tolist(), skip) for row, skip in zip(rows, chunk["prompt_lengths"].tolist(), strict=True)]
    return found


def make_embedder(
    model: Path, attn: str = "bb", implementation: str = "packed", projection: int | None = None, **contract
) -> Embedder:
    backbone = load_backbone(str(model), load_config(str(model), attn), implementation)
    return Embedder(backbone, TextContract(**contract), projection)


def make_model_folder(model: Path, folder: Path, **options) -> Embedder:
    """Save an untrained model with its tokenizer and contract; `options` are those of `make_embedder`."""
    embedder = make_embedder(model, **options).eval()
    contract = embedder.contract
    save_model_folder(embedder, TextTokenizer(load_tokenizer(str(model), contract), contract), folder)
    return embedder


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def flat_weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


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


def train(*flags: str, ranks: int = 1, **env: str) -> subprocess.CompletedProcess:
    """`gritlm train`, which must succeed."""
    done = run("-m", "gritlm", "train", *flags, ranks=ranks, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


DRIVER = ROOT / "tests" / "smoke" / "driver.py"


def batches_of(rows_file: Path, rank: int) -> list:
    """What the driver wrote: the data set and the rows of each step of a rank."""
    return [json.loads(line) for line in open(f"{rows_file}.{rank}")]


def log_of(out: Path) -> list[dict]:
    """What a run logged at each step, as it wrote it to log.jsonl."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


def losses(out: Path) -> list[float]:
    """The logged loss of every step of a finished run. A step that was taken again after a kill counts once."""
    return list({entry["step"]: entry["loss"] for entry in log_of(out)}.values())
