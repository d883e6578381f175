"""Public data of a common shape into the training format, with a held-out part that nothing leaks into, and a card.

IN is a BEIR folder (corpus.jsonl, queries.jsonl, qrels/), a .csv, .tsv, .jsonl, .jsonl.gz or .parquet file of columns,
or hub:NAME for a data set of the Hugging Face hub. OUT becomes a folder: train/NAME.jsonl for TRAIN_DATA, held_out/ in
BEIR's format, README.md.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gritlm.cli import quieten, verb_parser
from gritlm.data.public_formats import (
    NEGATIVE,
    POSITIVE,
    QUERY,
    BadRows,
    Columns,
    RawExample,
    read_beir,
    read_columns,
    read_hub,
)
from gritlm.data.rows import parse_row, text_id
from gritlm.errors import UserError
from gritlm.files import written_aside

EXAMPLES = """examples:
  gritlm prepare pairs.csv out/ --instruction 'Given a question, retrieve passages that answer it'
  gritlm prepare triples.tsv out/ --no_header --held_out 1000                       MS MARCO: query, positive, negative
  gritlm prepare beir/scifact out/ --split train
  gritlm prepare hub:sentence-transformers/natural-questions out/ --licence cc-by-sa-3.0 --held_out 500
  TRAIN_DATA=out/train MODEL_NAME_OR_PATH=... bash scripts/training/train_embonly.sh"""

# ---- what is kept


@dataclass
class Prepared:
    """Rows in the training format, checked, and what was left out."""

    rows: list[dict] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    repeated: int = 0
    merged: int = 0
    dropped_negatives: int = 0
    repeated_negatives: int = 0


def prepare(found: Iterable[RawExample], instruction: str, bad: BadRows) -> Prepared:
    """Check every row as training would. One with the query and positives of an earlier row gives it its negatives.

    Raises:
        UserError: at the first bad row, unless they are skipped.
    """
    prepared, first = Prepared(), {}
    for row in tqdm(found, "reading", unit=" rows", delay=2):
        query = [instruction, row.query] if instruction else row.query
        made = {"query": query, "pos": row.positives, "neg": row.negatives}
        try:
            checked = parse_row(made, row.where)
        except UserError as error:
            bad.add(error)
            continue
        key = (checked["query_id"], *sorted(set(checked["pos_id"])))
        prepared.dropped_negatives += checked["dropped_negatives"]
        negatives = dict(zip(_ids(made, "neg"), made["neg"], strict=True))
        new = {key: text for key, text in negatives.items() if key not in checked["pos_id"]}
        prepared.repeated_negatives += len(made["neg"]) - checked["dropped_negatives"] - len(new)
        if key not in first:
            first[key] = len(prepared.rows)
            prepared.rows.append(made | {"neg": list(new.values())})
            continue
        earlier = prepared.rows[first[key]]
        known = set(_ids(earlier, "neg"))
        earlier["neg"] += [text for key, text in new.items() if key not in known]
        if new.keys() <= known:
            prepared.repeated += 1
        else:
            prepared.merged += 1
    prepared.skipped = bad.messages
    return prepared


def split_by_document(rows: list[dict], wanted: int, seed: int) -> tuple[list[dict], list[dict], int]:
    """(train, held out, negatives left out of train): no held-out query or positive stands anywhere in train.

    Rows that share a query or a positive, directly or through others, stay together. Groups are drawn at random, none
    larger than a tenth of what is wanted, until there are so many rows.
    """
    leader = list(range(len(rows)))

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    holder: dict[int, int] = {}
    for number, row in enumerate(rows):
        for key in _ids(row, "query", "pos"):
            leader[find(number)] = find(holder.setdefault(key, number))
    groups: dict[int, list[int]] = {}
    for number in range(len(rows)):
        groups.setdefault(find(number), []).append(number)
    out: set[int] = set()
    order = list(groups)
    for number in np.random.default_rng(seed).permutation(len(order)):
        group = groups[order[number]]
        if len(group) <= max(1, wanted // 10) and len(out) + len(group) <= wanted:
            out.update(group)
    held = [rows[number] for number in sorted(out)]
    kept_out = {key for row in held for key in _ids(row, "query", "pos")}
    train, left_out = [], 0
    for number, row in enumerate(rows):
        if number not in out:
            negatives = [text for key, text in zip(_ids(row, "neg"), row["neg"], strict=True) if key not in kept_out]
            left_out += len(row["neg"]) - len(negatives)
            train.append(row | {"neg": negatives})
    return train, held, left_out


def _ids(row: dict, *sides: str) -> list[int]:
    texts = [text for side in sides for text in ([row[side]] if side == "query" else row[side])]
    return [text_id(_text(text)) for text in texts]


def _text(text: str | list[str]) -> str:
    return text if isinstance(text, str) else text[1]


# ---- writing


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_held_out(folder: Path, rows: list[dict]) -> None:
    """A BEIR folder: the held-out queries over the held-out passages, negatives included."""
    queries, corpus = ({}, {})  # text's id -> the line it gets
    qrels = {}  # in order, each once

    def number_in(lines: dict[int, dict], letter: str, text: str, **more: str) -> str:
        return lines.setdefault(text_id(text), {"_id": f"{letter}{len(lines)}", **more, "text": text})["_id"]

    for row in rows:
        query = number_in(queries, "q", _text(row["query"]))
        for side in ("pos", "neg"):
            for text in row[side]:
                document = number_in(corpus, "d", text if isinstance(text, str) else "".join(text), title="")
                if side == "pos":
                    qrels[f"{query}\t{document}\t1"] = None
    write_jsonl(folder / "queries.jsonl", queries.values())
    write_jsonl(folder / "corpus.jsonl", corpus.values())
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *qrels]) + "\n")


def card(args: argparse.Namespace, prepared: Prepared, train: list, held: list, left_out: int) -> str:
    negatives = Counter(len(row["neg"]) for row in train)
    queries = len({key for row in held for key in _ids(row, "query")})
    lines = [
        f"# {args.name}",
        "",
        f"- source: {args.source or args.input}",
        f"- licence: {args.licence or 'unknown; look it up before you share anything made from it'}",
        f"- instruction: {args.instruction or 'none'}",
        f"- train: {len(train)} rows in `train/{args.name}.jsonl`, {sum(len(row['pos']) for row in train)} positives, "
        f"{min(negatives, default=0)} to {max(negatives, default=0)} negatives a row",
        f"- held out: {queries} queries in `held_out/` (BEIR format); neither they nor their positives stand in train"
        + (f" ({left_out} negatives were left out for that)" if left_out else ""),
        f"- left out: {prepared.repeated} repeated rows ({prepared.merged} more gave "
        f"their negatives to a row with the same query and positives), {prepared.dropped_negatives} negatives that "
        f"repeat a positive of their row and {prepared.repeated_negatives} that repeat one another, "
        f"{len(prepared.skipped)} bad rows" + (" (`skipped.txt`)" if prepared.skipped else ""),
        f"- made by: `gritlm prepare`, seed {args.seed}",
    ]
    return "\n".join(lines) + "\n"


# ---- the verb


def parse(argv: list[str]) -> argparse.Namespace:
    parser = verb_parser("prepare", __doc__, EXAMPLES)
    add = parser.add_argument
    add("input", metavar="IN", help="a BEIR folder, a file of columns, or hub:NAME")
    add("output", type=Path, metavar="OUT", help="a new folder")
    add("--name", help="of the data set; default: the input's")
    add("--instruction", default="", help="the task in a sentence; put before each query as 'Instruct: ...\\nQuery: '")
    add("--query_column", help=f"default: the first of {', '.join(QUERY)}")
    add("--positive_column", help=f"text or list of texts; default: the first of {', '.join(POSITIVE)}")
    add("--negative_columns", nargs="+", help=f"default: all of {', '.join(NEGATIVE)}, negative_1, ...")
    add("--no_header", action="store_true", help=".csv, .tsv: the columns are query, positive[, negative]")
    add("--split", help="of a BEIR folder or a hub data set, default train")
    add("--config", help="of a hub data set")
    add("--held_out", type=int, default=0, help="queries to hold out, with their passages; default 0")
    add("--seed", type=int, default=0, help="of the held-out draw")
    add("--skip_bad", action="store_true", help="leave bad rows out and list them in skipped.txt")
    add("--source", help="for the card; default: IN")
    add("--licence", help="for the card")
    args = parser.parse_args(argv)
    for name in ("held_out", "seed"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: wanted 0 or more")
    args.name = args.name or Path(args.input.removeprefix("hub:")).resolve().name.lstrip(".").split(".")[0]
    if not args.name or "/" in args.name or args.name.startswith("."):
        raise UserError(f"--name {args.name!r}: wanted a name for a file")
    return args


def read(args: argparse.Namespace, bad: BadRows) -> Iterable[RawExample]:
    """The rows of IN, whatever it is.

    Raises:
        UserError: it is nothing, or a flag is for another kind of input.
    """
    path, columns = Path(args.input), Columns(args.query_column, args.positive_column, args.negative_columns)
    named = {"query_column", "positive_column", "negative_columns"}
    if args.input.startswith("hub:"):
        used = named | {"split", "config"}
        found = read_hub(args.input.removeprefix("hub:"), args.config, args.split or "train", columns)
    elif path.is_dir():
        used = {"split"}
        found = read_beir(path, args.split or "train", bad)
    elif path.exists():
        used = named | ({"no_header"} if path.name.removesuffix(".gz").endswith((".csv", ".tsv")) else set())
        found = read_columns(path, columns, bad, args.no_header)
    else:
        raise UserError(f"{path}: no such file or folder (a data set of the hub is hub:NAME)")
    for name in sorted({*named, "split", "config", "no_header"} - used):
        if getattr(args, name):
            raise UserError(f"--{name} has no effect on {args.input}, which is another kind of input")
    return found


def main(argv: list[str]) -> int:
    args = parse(argv)
    quieten()
    if args.output.exists():
        raise UserError(f"{args.output} exists; nothing is overwritten, name a new folder")
    found = read(args, bad := BadRows(args.skip_bad, " (--skip_bad goes on without such rows, and lists them)"))
    instruction = f"Instruct: {args.instruction}\nQuery: " if args.instruction else ""
    prepared = prepare(found, instruction, bad)
    train, held, left_out = split_by_document(prepared.rows, args.held_out, args.seed)
    if not prepared.rows:
        raise UserError(f"{args.input}: found no good row to train on")
    if not train or (args.held_out and not held):
        found = "no row left to train on" if held else "no rows apart from the others, by query and by positive"
        raise UserError(f"--held_out {args.held_out}: found {found} ({len(prepared.rows)} rows in all)")

    with written_aside(args.output) as aside:
        write_jsonl(aside / "train" / f"{args.name}.jsonl", train)
        if held:
            write_held_out(aside / "held_out", held)
        if prepared.skipped:
            (aside / "skipped.txt").write_text("\n".join(prepared.skipped) + "\n")
        (aside / "README.md").write_text(card(args, prepared, train, held, left_out))
    print((args.output / "README.md").read_text(), end="")
    print(f"to train on it: TRAIN_DATA={args.output / 'train'}")
    return 0
