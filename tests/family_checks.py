"""What docs/backbones.md says of each family, measured on tiny models. Restartable; the tests run some of it.

    python tests/family_checks.py CELLS.json                   run the cells that CELLS.json does not have; the table
    python tests/family_checks.py CELLS.json --only bert resume                          run one cell

A result is in the file as soon as its cell ends. A cell that fails is run again.
"""

import json
import re
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch
from families import build_family
from helpers import INSTRUCTION, WORDS, flat_gradient, make_builder, make_embedder, relative, train_flags, write_jsonl
from processes import run
from sentence_transformers import SentenceTransformer
from torch.nn.utils.rnn import pad_sequence

from gritlm import GritLM
from gritlm.models.chunks import ChunkConfig, make_chunks
from gritlm.models.families import FAMILIES, is_encoder
from gritlm.models.probe import probe_attention
from gritlm.models.text import Text
from gritlm.training.train import main as train

TEXTS = [*WORDS, *(" ".join(WORDS[i : i + 9]) for i in range(31)), " ".join(WORDS * 3), "river", "a. b", "50 : 7"]


def attentions(family: str) -> tuple[str, ...]:
    return ("bb",) if is_encoder(family) else ("bb", "cc")


def probed(family: str, folder: Path) -> str:
    """The largest change that should be none, of both directions."""
    base = build_family(folder, family)
    worst = 0.0
    for attn in attentions(family):
        model = make_embedder(base, attn)
        changes = probe_attention(model, model, torch.device("cpu"), attn)
        worst = max(worst, *(value for name, value in changes.items() if name != "last_to_first"))
    return f"{worst:.0e}"


def packed_and_padded(family: str, folder: Path) -> str:
    """The relative difference of vectors and gradients, of texts of up to 64 tokens."""
    base, worst = build_family(folder, family), 0.0
    texts = [torch.randint(2, 500, (length,)) for length in (64, 40, 12, 12, 7)]
    lengths = torch.tensor([len(text) for text in texts])
    numbers = {"lengths": lengths, "prompt_lengths": torch.tensor([3, 0, 2, 0, 0])}
    for attn in attentions(family):
        found = []
        for more in (
            {"input_ids": torch.cat(texts), "equal_length_runs": tuple((1, len(text)) for text in texts)},
            {"input_ids": pad_sequence(texts, batch_first=True)},
        ):
            model = make_embedder(base, attn)
            vectors = model(**numbers, **more)
            (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
            found.append((vectors.detach(), flat_gradient(model)))
        worst = max([worst, *(relative(a, b) for a, b in zip(*found, strict=True))])
    assert worst < 1e-5, worst
    return f"{worst:.0e}"


def verified(family: str, ranks: int) -> str:
    """The largest error of `gritlm verify-gradients`, whose cells must all be equal."""
    engines = ["plain"] if ranks == 1 else ["ddp", "fsdp2"]
    flags = ["--terms", "info_nce", "--num_layers", "0", "--queries", str(8 // ranks), "--engines", *engines]
    # One rank too is started as torchrun starts it: the verb would start its own in a new interpreter.
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    place = place if ranks == 1 else {}
    done = run("-m", "gritlm", "verify-gradients", "--families", family, *flags, ranks=ranks, **place)
    assert done.returncode == 0, done.stdout + done.stderr
    errors = re.findall(r"(\S+)  ok$", done.stdout, re.MULTILINE)
    return f"{max(map(float, errors)):.0e}"


def train_family(family: str, folder: Path, **more) -> tuple[Path, Path, list[str]]:
    """A base, the data, and the flags of a run of four steps that saves after the second."""
    base = build_family(folder / "base", family)
    write_jsonl(folder / "data.jsonl", rows=40, negatives=2, seed=1)
    steps = {"max_steps": 4, "save_steps": 2, "save_total_limit": 5, "chunk_tokens": 256}
    flags = train_flags(base, folder / "data.jsonl", folder / "run", folder / "cache", **steps | more)
    assert train(flags) == 0
    return base, folder / "run", flags


def resumed(family: str, folder: Path) -> str:
    """A run that goes on from its second step ends with the same bytes as one that was not stopped."""
    _, out, flags = train_family(family, folder)
    again, checkpoint = folder / "again", shutil.copytree(out / "checkpoint-2", folder / "kept" / "checkpoint-2")
    flags[flags.index("--output_dir") + 1] = str(again)
    assert train([*flags, "--resume_from_checkpoint", str(checkpoint)]) == 0
    first, second = ((place / "model.safetensors").read_bytes() for place in (out, again))
    assert first == second
    assert first != (checkpoint / "model.safetensors").read_bytes(), "control: nothing was trained"
    return "same bytes"


def served(family: str, folder: Path) -> str:
    """The smallest cosine of the trainer's vectors and sentence-transformers', of queries and passages."""
    base, out, _ = train_family(family, folder, max_steps=2)
    ours, theirs = GritLM(out), SentenceTransformer(str(out), device="cpu")
    embedder = make_embedder(base, pooling_method=ours.contract.pooling_method).eval()
    embedder.load_weights(out / "checkpoint-2")
    tokenizer = make_builder(base, folder / "data.jsonl", folder / "cache", append_eos=ours.contract.append_eos)
    tokens = tokenizer.text_tokenizer([Text(INSTRUCTION, text) for text in TEXTS], 48)
    chunks, row_of_text = make_chunks(tokens, ChunkConfig(512), 0)
    with torch.no_grad():
        trained = torch.cat([embedder(**chunk) for chunk in chunks])[row_of_text].numpy()
    theirs.max_seq_length = ours.model.contract.query_max_len = 48
    worst = [
        (trained * theirs.encode(TEXTS, prompt_name="query")).sum(1).min(),
        (ours.encode_queries(TEXTS) * theirs.encode_query(TEXTS)).sum(1).min(),
        (ours.encode_corpus(TEXTS) * theirs.encode_document(TEXTS)).sum(1).min(),
    ]
    assert min(worst) > 0.99999, (worst, ours.contract)
    assert (trained * np.roll(trained, 1, axis=0)).sum(1).min() < 0.99, "control: all texts have one vector"
    return f"{min(worst):.6f}"


CELLS = {
    "probe": probed,
    "packed = padded": packed_and_padded,
    "1 rank": lambda family, folder: verified(family, 1),
    "2 ranks": lambda family, folder: verified(family, 2),
    "resume": resumed,
    "served": served,
}


def as_table(cells: dict[str, str]) -> str:
    head = f"| family | {' | '.join(CELLS)} |\n|{'---|' * (len(CELLS) + 1)}"
    kind = {name: f"`{name}`{' (encoder)' if is_encoder(name) else ''}" for name in FAMILIES}
    rows = [f"| {kind[f]} | {' | '.join(cells.get(f'{f} {cell}', 'not run') for cell in CELLS)} |" for f in FAMILIES]
    return "\n".join([head, *rows])


def main(path: Path, only: tuple[str, str] | None) -> int:
    cells = json.loads(path.read_text()) if path.exists() else {}
    wanted = [only] if only else [(family, cell) for family in FAMILIES for cell in CELLS]
    for family, cell in wanted:
        if f"{family} {cell}" in cells and not only:
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                cells[f"{family} {cell}"] = result = CELLS[cell](family, Path(folder))
            path.write_text(json.dumps(cells, indent=1))
        except Exception:
            traceback.print_exc()
            result = "FAILED"
        print("cell:", family, cell, result, flush=True)
    print(as_table(cells))
    return int(any(f"{family} {cell}" not in cells for family, cell in wanted))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), tuple(sys.argv[3:5]) if sys.argv[2:3] == ["--only"] else None))
