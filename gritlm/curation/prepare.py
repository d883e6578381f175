"""Convert public data to the training format, hold out queries that do not leak into train, and write a card.

IN is a BEIR folder (corpus.jsonl, queries.jsonl, qrels/), a .csv, .tsv, .jsonl, .jsonl.gz or .parquet file with named
columns, or hub:NAME for a data set of the Hugging Face hub. The new folder OUT holds train/NAME.jsonl for TRAIN_DATA,
held_out/ in BEIR's format, and README.md.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gritlm.cli import home_expanded, verb_parser
from gritlm.data.beir import read_beir
from gritlm.data.columns import NEGATIVE, POSITIVE, QUERY, Columns, read_columns
from gritlm.data.hub import read_hub
from gritlm.data.raw import BadRows, RawExample
from gritlm.data.rows import parse_row, text_id
from gritlm.errors import UserError
from gritlm.files import written_aside

EXAMPLES = """examples:
  gritlm prepare pairs.csv out/ --instruction 'Given a question, retrieve passages that answer it'
  gritlm prepare triples.tsv out/ --no_header --held_out 1000                       MS MARCO: query, positive, negative
  gritlm prepare beir/scifact out/ --split train
  gritlm prepare hub:sentence-transformers/natural-questions out/ --licence cc-by-sa-3.0 --held_out 500
  TRAIN_DATA=out/train MODEL_NAME_OR_PATH=... bash scripts/training/train_embonly.sh"""

# ---- selecting rows


@dataclass
class Prepared:
    """Checked rows in the training format, and counts of everything left out."""

    rows: list[dict] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # messages of bad rows
    repeated: int = 0
    merged: int = 0
    dropped_negatives: int = 0
    repeated_negatives: int = 0


def prepare(examples: Iterable[RawExample], instruction: str, bad: BadRows) -> Prepared:
    """Check every example as training would. Examples with equal query and positives become one row.

    Raises:
        UserError: at the first bad row, unless bad rows are skipped.
    """
    prepared, first = Prepared(skipped=bad.messages), {}
    for example in tqdm(examples, "reading", unit=" rows", delay=2):
        query = [instruction, example.query] if instruction else example.query
        row = {"query": query, "pos": example.positives, "neg": example.negatives}
        try:
            checked = parse_row(row, example.where)
        except UserError as error:
            bad.add(error)
            continue
        prepared.dropped_negatives += checked["dropped_negatives"]
        by_id = dict(zip(_ids(row, "neg"), row["neg"], strict=True))
        negatives = {key: text for key, text in by_id.items() if key not in checked["pos_id"]}
        prepared.repeated_negatives += len(row["neg"]) - checked["dropped_negatives"] - len(negatives)
        row_key = (checked["query_id"], *sorted(set(checked["pos_id"])))
        if row_key not in first:
            first[row_key] = len(prepared.rows)
            prepared.rows.append(row | {"neg": list(negatives.values())})
            continue
        earlier = prepared.rows[first[row_key]]
        known = set(_ids(earlier, "neg"))
        earlier["neg"] += [text for key, text in negatives.items() if key not in known]
        if negatives.keys() <= known:
            prepared.repeated += 1
        else:
            prepared.merged += 1
    return prepared


def hold_out(rows: list[dict], wanted: int, seed: int) -> tuple[list[dict], list[dict], int]:
    """Hold out at most `wanted` rows; none of their queries and positives is in the training rows.

    Rows that share a query or a positive, directly or through other rows, form a group and stay together. Groups are
    held out in random order; a group larger than a tenth of `wanted` is not.

    Returns:
        training rows, held-out rows, and the number of negatives removed from the training rows.
    """
    leader = list(range(len(rows)))

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    first_with: dict[int, int] = {}
    for number, row in enumerate(rows):
        for key in _ids(row, "query", "pos"):
            leader[find(number)] = find(first_with.setdefault(key, number))
    by_leader: dict[int, list[int]] = {}
    for number in range(len(rows)):
        by_leader.setdefault(find(number), []).append(number)
    held_out: set[int] = set()
    groups = list(by_leader.values())
    for number in np.random.default_rng(seed).permutation(len(groups)):
        group = groups[number]
        if len(group) <= max(1, wanted // 10) and len(held_out) + len(group) <= wanted:
            held_out.update(group)
    held = [rows[number] for number in sorted(held_out)]
    held_ids = {key for row in held for key in _ids(row, "query", "pos")}
    train, removed = [], 0
    for number, row in enumerate(rows):
        if number not in held_out:
            negatives = [text for key, text in zip(_ids(row, "neg"), row["neg"], strict=True) if key not in held_ids]
            removed += len(row["neg"]) - len(negatives)
            train.append(row | {"neg": negatives})
    return train, held, removed


def _ids(row: dict, *fields: str) -> list[int]:
    texts = [text for name in fields for text in ([row[name]] if name == "query" else row[name])]
    return [text_id(_string(text)) for text in texts]


def _string(text: str | list[str]) -> str:
    return text if isinstance(text, str) else text[1]


# ---- writing


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_held_out(folder: Path, rows: list[dict]) -> None:
    """Write held-out rows as a BEIR folder. Their positives and negatives are the corpus."""
    queries: dict[int, dict[str, str]] = {}  # text id -> line
    corpus: dict[int, dict[str, str]] = {}
    qrels: dict[str, None] = {}  # ordered, without repeats

    def add(lines: dict[int, dict[str, str]], letter: str, text: str, **columns: str) -> str:
        line = {"_id": f"{letter}{len(lines)}", **columns, "text": text}
        return lines.setdefault(text_id(text), line)["_id"]

    for row in rows:
        query = add(queries, "q", _string(row["query"]))
        for name in ("pos", "neg"):
            for text in row[name]:
                passage = add(corpus, "d", text if isinstance(text, str) else "".join(text), title="")
                if name == "pos":
                    qrels[f"{query}\t{passage}\t1"] = None
    write_jsonl(folder / "queries.jsonl", queries.values())
    write_jsonl(folder / "corpus.jsonl", corpus.values())
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(
        "\n".join(["query-id\tcorpus-id\tscore", *qrels]) + "\n", encoding="utf-8"
    )


def card(args: argparse.Namespace, prepared: Prepared, train: list[dict], held: list[dict], removed: int) -> str:
    """The README of the data set."""
    negatives = [len(row["neg"]) for row in train]
    queries = len({key for row in held for key in _ids(row, "query")})
    lines = [
        f"# {args.name}",
        "",
        f"- source: {args.source or args.input}",
        f"- licence: {args.licence or 'unknown; look it up before you share anything made from it'}",
        f"- instruction: {args.instruction or 'none'}",
        f"- train: {len(train)} rows in `train/{args.name}.jsonl`, {sum(len(row['pos']) for row in train)} positives, "
        f"{min(negatives, default=0)} to {max(negatives, default=0)} negatives per row",
        f"- held out: {queries} queries in `held_out/` (BEIR format); neither they nor their positives are in train"
        + (f" ({removed} negatives were removed from train for that)" if removed else ""),
        f"- left out: {prepared.repeated} repeated rows; {prepared.dropped_negatives} negatives that repeat a positive "
        f"of their row; {prepared.repeated_negatives} repeated negatives; {len(prepared.skipped)} bad rows"
        + (" (`skipped.txt`)" if prepared.skipped else ""),
        f"- merged: {prepared.merged} rows into an earlier row with the same query and positives",
        f"- made by: `gritlm prepare`, seed {args.seed}",
    ]
    return "\n".join(lines) + "\n"


# ---- the verb


def parse(argv: list[str]) -> argparse.Namespace:
    parser = verb_parser("prepare", __doc__, EXAMPLES)
    add = parser.add_argument
    add("input", type=home_expanded, metavar="IN", help="a BEIR folder, a file with named columns, or hub:NAME")
    add("output", type=Path, metavar="OUT", help="a new folder")
    add("--name", help="name of the data set; default: the name of IN")
    add("--instruction", default="", help="the task in one sentence; prepended as 'Instruct: ...\\nQuery: '")
    add("--query_column", help=f"default: the first of {', '.join(QUERY)} in the file")
    add("--positive_column", help=f"one passage or a list; default: the first of {', '.join(POSITIVE)}")
    add("--negative_columns", nargs="+", help=f"default: all of {', '.join(NEGATIVE)}, negative_1, ...")
    add("--no_header", action="store_true", help=".csv, .tsv: the columns are query, positive[, negative]")
    add("--split", help="split of a BEIR folder or a hub data set, default train")
    add("--config", help="configuration (subset) of a hub data set")
    add("--held_out", type=int, default=0, help="number of rows to hold out for evaluation, default 0")
    add("--seed", type=int, default=0, help="seed of the random choice of held-out rows, default 0")
    add("--skip_bad", action="store_true", help="leave bad rows out and list them in skipped.txt")
    add("--source", help="the source named in the card; default: IN")
    add("--licence", help="the licence named in the card")
    args = parser.parse_args(argv)
    for name in ("held_out", "seed"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: wanted 0 or more")
    args.name = args.name or Path(args.input.removeprefix("hub:")).resolve().name.lstrip(".").split(".")[0]
    if not args.name or "/" in args.name or args.name.startswith("."):
        raise UserError(f"--name {args.name!r}: wanted a file name")
    return args


def read(args: argparse.Namespace, bad: BadRows) -> Iterable[RawExample]:
    """Read the examples of IN.

    Raises:
        UserError: IN does not exist, or a flag has no effect on this kind of input.
    """
    path, columns = Path(args.input), Columns(args.query_column, args.positive_column, args.negative_columns)
    column_flags = {"query_column", "positive_column", "negative_columns"}
    if args.input.startswith("hub:"):
        used = column_flags | {"split", "config"}
        examples = read_hub(args.input.removeprefix("hub:"), args.config, args.split or "train", columns)
    elif path.is_dir():
        used = {"split"}
        examples = read_beir(path, args.split or "train", bad)
    elif path.exists():
        used = column_flags | ({"no_header"} if path.name.removesuffix(".gz").endswith((".csv", ".tsv")) else set())
        examples = read_columns(path, columns, bad, args.no_header)
    else:
        raise UserError(f"{path}: no such file or folder (a data set of the hub is hub:NAME)")
    for name in sorted({*column_flags, "split", "config", "no_header"} - used):
        if getattr(args, name):
            raise UserError(f"--{name} has no effect on {args.input}, which is another kind of input")
    return examples


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.output.exists():
        raise UserError(f"{args.output} exists; nothing is overwritten, name a new folder")
    examples = read(args, bad := BadRows(args.skip_bad, " (--skip_bad leaves such rows out and lists them)"))
    instruction = f"Instruct: {args.instruction}\nQuery: " if args.instruction else ""
    prepared = prepare(examples, instruction, bad)
    train, held, removed = hold_out(prepared.rows, args.held_out, args.seed)
    if not prepared.rows:
        raise UserError(f"{args.input}: found no good row to train on")
    if not train or (args.held_out and not held):
        found = "no row left to train on" if held else "no row that shares no query and no positive with others"
        raise UserError(f"--held_out {args.held_out}: found {found} ({len(prepared.rows)} rows in all)")

    with written_aside(args.output) as aside:
        write_jsonl(aside / "train" / f"{args.name}.jsonl", train)
        if held:
            write_held_out(aside / "held_out", held)
        if prepared.skipped:
            (aside / "skipped.txt").write_text("\n".join(prepared.skipped) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(card(args, prepared, train, held, removed), encoding="utf-8")
    print((args.output / "README.md").read_text(encoding="utf-8"), end="")
    print(f"to train on it: TRAIN_DATA={args.output / 'train'}")
    return 0
