"""Build and evaluate a retrieval task that needs neither data nor a network: docstring summary -> source code.

`prepare` collects the pairs from the Python of this machine and makes a tiny untrained Qwen3. `gritlm train` trains it
like any other model. `report` evaluates it on modules that are not in the training data.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from gritlm.cli import home_expanded, verb_parser
from gritlm.data.stdlib_pairs import MAX_PAIRS, collect
from gritlm.errors import UserError
from gritlm.evaluation.metrics import retrieval_metrics
from gritlm.gritlm import GritLM
from gritlm.models.text import TextContract
from gritlm.models.tiny import build_model

EXAMPLES = """examples (scripts/training/train_embonly.sh calls both):
  gritlm quickstart prepare --folder outputs/quickstart-task
  gritlm quickstart report --folder outputs/quickstart-task --model outputs/quickstart"""

INSTRUCTION = "Instruct: Given a summary, find the Python code that it describes\nQuery: "


def measure(model: GritLM, task: dict[str, Any]) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """The metrics on the held-out pairs, and the vectors of the queries and of the corpus."""
    queries = np.asarray(model.encode(task["queries"], instruction=INSTRUCTION))
    corpus = np.asarray(model.encode(task["corpus"]))
    return retrieval_metrics(queries, corpus, [{i} for i in range(len(queries))]), queries, corpus


def prepare(folder: Path, max_len: int, max_pairs: int) -> None:
    """Write train.jsonl, base/ (the untrained model) and held_out.json (with its metrics), unless they exist."""
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
    task: dict[str, Any] = {"queries": [summary for summary, _ in held], "corpus": [code for _, code in held]}
    contract = TextContract(query_max_len=max_len, passage_max_len=max_len)
    task["before"] = measure(GritLM(folder / "base", contract), task)[0]
    (folder / "held_out.json").write_text(json.dumps(task), encoding="utf-8")
    print(f"{len(train)} pairs to train on; {len(held)} held out, from standard-library modules not trained on")


def report(folder: Path, model_folder: str) -> None:
    """Print the metrics before and after training, three queries with the code found, and how to use the model."""
    if not (folder / "held_out.json").is_file():
        raise UserError(f"{folder}: found no held_out.json, wanted a folder made by gritlm quickstart prepare")
    task = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))
    model = GritLM(model_folder)
    after, queries, corpus = measure(model, task)
    print(f"\nretrieval over {len(corpus)} held-out pairs   untrained   trained")
    for name, value in after.items():
        print(f"  {name:34} {task['before'][name]:8.3f}  {value:8.3f}")
    print("\nthree held-out queries and the nearest code:")
    for i in np.linspace(0, len(queries) - 1, 5).astype(int)[1:4]:
        scores = corpus @ queries[i]
        found = task["corpus"][int(scores.argmax())].strip().splitlines()[0]
        rank = 1 + int((scores > scores[i]).sum())
        print(f"  {task['queries'][i][:90]}\n    -> {found[:80]}   (the right code has rank {rank})")
    print(f"""
The model is in {model_folder}. Use it with:
  from gritlm import GritLM
  model = GritLM({model_folder!r})
  print(model.encode_queries(["read a file line by line"]) @ model.encode_corpus(["def readlines(f): ..."]).T)""")


def main(argv: list[str]) -> int:
    parser = verb_parser("quickstart", __doc__, EXAMPLES)
    parser.add_argument("action", choices=("prepare", "report"))
    parser.add_argument("--folder", type=Path, required=True, help="folder of the data and the untrained model")
    parser.add_argument("--model", type=home_expanded, help="report: folder of the trained model")
    parser.add_argument("--max_len", type=int, default=64, help="prepare: tokens per text, default 64")
    parser.add_argument("--max_pairs", type=int, default=MAX_PAIRS, help="prepare: at most this many package pairs")
    arguments = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    if arguments.action == "prepare":
        prepare(arguments.folder, arguments.max_len, arguments.max_pairs)
    elif arguments.model is None:
        raise UserError("--model is missing")
    else:
        report(arguments.folder, arguments.model)
    return 0
