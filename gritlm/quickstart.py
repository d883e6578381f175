"""Build and evaluate a retrieval task that needs neither data nor a network: docstring summary -> source code.

`prepare` collects the pairs from the Python of this machine and makes a tiny untrained Qwen3. `gritlm train` trains it
like any other model, and evaluates it on modules that are not in the training data. `report` shows what it finds.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import transformers

from gritlm.cli import home_expanded, verb_parser
from gritlm.data.stdlib_pairs import MAX_PAIRS, collect
from gritlm.errors import UserError
from gritlm.evaluation.read_sets import read_sets
from gritlm.evaluation.results import read_results
from gritlm.evaluation.sets import RetrievalSet
from gritlm.gritlm import GritLM
from gritlm.models.tiny import build_model

EXAMPLES = """examples (scripts/training/train_embonly.sh calls both):
  gritlm quickstart prepare --folder outputs/quickstart-task
  gritlm quickstart report --folder outputs/quickstart-task --model outputs/quickstart"""

INSTRUCTION = "Instruct: Given a summary, find the Python code that it describes\nQuery: "
QRELS = "held_out/qrels/test.tsv"


def prepare(folder: Path, max_pairs: int) -> None:
    """Write train.jsonl, base/ (the untrained model) and held_out/ (a BEIR folder), unless they exist."""
    if (folder / QRELS).is_file():
        print(f"task found in {folder}")
        return
    print("collecting docstring -> code pairs from this machine's Python ...", flush=True)
    train, held = collect(max_pairs)
    rows = ({"query": [INSTRUCTION, summary], "pos": [code], "neg": []} for summary, code in train)
    write_lines(folder / "train.jsonl", map(json.dumps, rows))
    build_model(folder / "base", [text for pair in train[:10_000] for text in pair])
    for number, name in enumerate(("queries", "corpus")):
        texts = ({"_id": str(key), "text": pair[number]} for key, pair in enumerate(held))
        write_lines(folder / "held_out" / f"{name}.jsonl", map(json.dumps, texts))
    judged = (f"{key}\t{key}\t1" for key in range(len(held)))
    write_lines(folder / QRELS, ["query-id\tcorpus-id\tscore", *judged])  # last: the task is complete
    print(f"{len(train)} pairs to train on; {len(held)} held out, from standard-library modules not trained on")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as out:
        out.writelines(f"{line}\n" for line in lines)


def report(folder: Path, model_folder: str) -> None:
    """Print the metrics before and after training, three queries with the code found, and how to use the model."""
    if not (folder / QRELS).is_file():
        raise UserError(f"{folder}: found no {QRELS}, wanted a folder made by gritlm quickstart prepare")
    (task,) = read_sets([str(folder / "held_out")])
    assert isinstance(task, RetrievalSet)
    results = sorted(Path(model_folder).glob("evaluation/step-*.json"), key=lambda path: int(path.stem[5:]))
    if len(results) > 1:  # the run's own evaluations: of the base, and of the last step
        before, after = (read_results(path).sets[0].metrics for path in (results[0], results[-1]))
        print(f"\nretrieval over {len(task.queries)} held-out pairs   untrained   trained")
        for name, value in after.items():
            print(f"  {name:34} {before[name]:8.3f}  {value:8.3f}")
    model, some = GritLM(model_folder), np.linspace(0, len(task.queries) - 1, 5).astype(int)[1:4].tolist()
    corpus = np.asarray(model.encode_corpus(task.corpus))
    print("\nthree held-out queries and the nearest code:")
    for i, vector in zip(some, np.asarray(model.encode_queries([task.queries[i] for i in some])), strict=True):
        scores = corpus @ vector
        found = task.corpus[int(scores.argmax())].strip().splitlines()[0]
        rank = 1 + int((scores > scores[task.corpus_ids.index(task.query_ids[i])]).sum())
        print(f"  {task.queries[i][:90]}\n    -> {found[:80]}   (the right code has rank {rank})")
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
    parser.add_argument("--max_pairs", type=int, default=MAX_PAIRS, help="prepare: at most this many package pairs")
    arguments = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    if arguments.action == "prepare":
        prepare(arguments.folder, arguments.max_pairs)
    elif arguments.model is None:
        raise UserError("--model is missing")
    else:
        report(arguments.folder, arguments.model)
    return 0
