"""The embedded default: a real retrieval task out of this machine's own Python, docstring summary -> source code.

`prepare` makes the data and a tiny untrained Qwen3; the main job trains it like any other model; `report` measures
what it learnt on modules it never saw. Needs no network and no data.
"""

import ast
import hashlib
import json
import sys
import sysconfig
import textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, PreTrainedTokenizerFast, Qwen3Config, set_seed

from gritlm.data.collator import TextContract, save_tokenizer
from gritlm.encode import GritLM
from gritlm.errors import UserError, run_verb, verb_parser
from gritlm.evaluation import retrieval_metrics

EXAMPLES = """examples (scripts/training/train_embonly.sh calls both):
  gritlm quickstart prepare --folder outputs/quickstart-task
  gritlm quickstart report --folder outputs/quickstart-task --model outputs/quickstart"""

INSTRUCTION = "Instruct: Given a summary, find the Python code that it describes\nQuery: "
HELD_OUT = 950  # pairs, at most: whole modules of the standard library
MAX_PAIRS = 40_000  # from installed packages; the standard library comes whole
END = "<|endoftext|>"
TINY = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
}
Pair = tuple[str, str]  # summary, source without its docstring


# ---- the pairs


def extract_pairs(path: Path) -> list[Pair]:
    """Every documented function and class of a file: first paragraph of its docstring, and its source without any."""
    try:
        source = path.read_text(encoding="utf-8")
        body = ast.parse(source).body if '"""' in source else []
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []  # a template, another Python's syntax: not ours to judge
    documented, docstring_lines = [], set()
    while body:
        node = body.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        body += node.body
        if docstring := ast.get_docstring(node):
            documented.append((node, " ".join(docstring.split("\n\n")[0].split())))
            docstring_lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = source.splitlines()
    pairs = []
    for node, summary in documented:
        kept = [lines[i - 1] for i in range(node.lineno, node.end_lineno + 1) if i not in docstring_lines]
        if len(node.body) > 1 and len(summary) >= 12 and summary.count(" ") >= 2:
            pairs.append((summary[:500], textwrap.dedent("\n".join(kept))[:4000].rstrip()))
    return pairs


def _files(root: Path, skip: tuple[str, ...]) -> list[Path]:
    return sorted(p for p in root.rglob("*.py") if not set(skip) & set(p.relative_to(root).parts))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _distinct(pairs: list[Pair], seen: set[str]) -> list[Pair]:
    """Pairs of which neither side stood before, here or in `seen`."""
    kept = []
    for summary, code in pairs:
        if summary not in seen and code not in seen:
            seen.update((summary, code))
            kept.append((summary, code))
    return kept


def collect(max_pairs: int) -> tuple[list[Pair], list[Pair]]:
    """(train, held out). Held out are whole modules of the standard library; nothing of them stands in train."""
    paths = sysconfig.get_paths()
    library = Path(paths["stdlib"])
    own = _files(library, ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"))
    # Files in an order that no package dominates, so that a cap takes some of each.
    installed = _files(Path(paths["purelib"]), ("tests", "test", "__pycache__"))
    installed.sort(key=lambda path: _digest("/".join(path.parts[-2:])))

    with ProcessPoolExecutor() as pool:
        by_module: dict[str, list[Pair]] = {}
        for path, pairs in zip(own, pool.map(extract_pairs, own, chunksize=16), strict=True):
            by_module.setdefault(path.relative_to(library).parts[0].removesuffix(".py"), []).extend(pairs)
        seen: set[str] = set()
        train, held = [], []
        for module in sorted(by_module, key=_digest):
            pairs = _distinct(by_module[module], seen)
            side = held if len(held) + len(pairs) <= HELD_OUT else train
            side += pairs
        more: list[Pair] = []
        for start in range(0, len(installed), 512):
            for pairs in pool.map(extract_pairs, installed[start : start + 512], chunksize=16):
                more += _distinct(pairs, seen)
            if len(more) >= max_pairs:
                break
    return train + more[:max_pairs], held


# ---- the untrained model


def build_tokenizer(folder: Path, texts: list[str], vocabulary: int) -> None:
    """A byte-level BPE trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END), folder)


def build_model(folder: Path, texts: list[str], vocabulary: int = 8192, seed: int = 0) -> None:
    """A tokenizer of the texts, and a tiny Qwen3 with random weights."""
    build_tokenizer(folder, texts, vocabulary)
    config = Qwen3Config(vocab_size=vocabulary, max_position_embeddings=1024, eos_token_id=0, **TINY)
    set_seed(seed)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        # At 0.02 the layers' output drowns the token's own embedding, and learning starts 100 steps later.
        model.embed_tokens.weight.mul_(0.3 / config.initializer_range)
    model.save_pretrained(folder)


# ---- before and after


def measure(model: GritLM, task: dict) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    queries = model.encode(task["queries"], instruction=INSTRUCTION)
    corpus = model.encode(task["corpus"])
    return retrieval_metrics(queries, corpus, [{i} for i in range(len(queries))]), queries, corpus


def prepare(folder: Path, max_len: int, max_pairs: int) -> None:
    """Write train.jsonl, held_out.json (with the untrained model's metrics) and base/ into the folder, once."""
    if (folder / "held_out.json").is_file():
        print(f"task found in {folder}")
        return
    print("collecting docstring -> code pairs from this machine's Python ...", flush=True)
    train, held = collect(max_pairs)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as out:
        for summary, code in train:
            row = {"query": [INSTRUCTION, summary], "pos": [code], "neg": []}
            out.write(json.dumps(row, ensure_ascii=True) + "\n")
    build_model(folder / "base", [text for pair in train[:10_000] for text in pair])
    task = {"queries": [summary for summary, _ in held], "corpus": [code for _, code in held]}
    contract = TextContract(query_max_len=max_len, passage_max_len=max_len)
    task["before"] = measure(GritLM(folder / "base", contract), task)[0]
    (folder / "held_out.json").write_text(json.dumps(task))
    print(f"{len(train)} pairs to train on; {len(held)} held out, of standard-library modules not trained on")


def report(folder: Path, model_folder: str) -> None:
    """Print held-out retrieval before and after, how to use the model, and three real queries answered by it."""
    if not (folder / "held_out.json").is_file():
        raise UserError(f"{folder}: found no held_out.json, wanted a folder made by gritlm quickstart prepare")
    task = json.loads((folder / "held_out.json").read_text())
    model = GritLM(model_folder)
    after, queries, corpus = measure(model, task)
    print(f"\nretrieval over {len(corpus)} held-out pairs   untrained   trained")
    for name, value in after.items():
        print(f"  {name:34} {task['before'][name]:8.3f}  {value:8.3f}")
    print("\nthree held-out queries, and the code found first:")
    for i in np.linspace(0, len(queries) - 1, 5).astype(int)[1:4]:
        scores = corpus @ queries[i]
        found = task["corpus"][int(scores.argmax())].strip().splitlines()[0]
        rank = 1 + int((scores > scores[i]).sum())
        print(f"  {task['queries'][i][:90]}\n    -> {found[:80]}   (the right code has rank {rank})")
    print(f"""
the model is in {model_folder}. To use it:
  from gritlm import GritLM
  model = GritLM({model_folder!r})
  print(model.encode_queries(["read a file line by line"]) @ model.encode_corpus(["def readlines(f): ..."]).T)""")


def main(argv: list[str]) -> int:
    parser = verb_parser("quickstart", __doc__, EXAMPLES)
    parser.add_argument("action", choices=("prepare", "report"))
    parser.add_argument("--folder", type=Path, required=True, help="the task's folder")
    parser.add_argument("--model", help="report: the trained model's folder")
    parser.add_argument("--max_len", type=int, default=64, help="prepare: longest text in tokens, default 64")
    parser.add_argument("--max_pairs", type=int, default=MAX_PAIRS, help="prepare: cap on pairs from packages")
    arguments = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    if arguments.action == "prepare":
        prepare(arguments.folder, arguments.max_len, arguments.max_pairs)
    elif arguments.model is None:
        raise UserError("--model is missing")
    else:
        report(arguments.folder, arguments.model)
    return 0


if __name__ == "__main__":
    sys.exit(run_verb(main))
