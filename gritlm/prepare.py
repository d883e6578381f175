"""Public data of a common shape into the training format, with a held-out part that nothing leaks into, and a card.

IN is a BEIR folder (corpus.jsonl, queries.jsonl, qrels/), a .csv, .tsv, .jsonl, .jsonl.gz or .parquet file of columns,
or hub:NAME for a data set of the Hugging Face hub. OUT becomes a folder: train/NAME.jsonl for TRAIN_DATA, held_out/ in
BEIR's format, README.md.
"""

import argparse
import csv
import gzip
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gritlm.data.rows import decode, parse_row, read_blocks, text_id
from gritlm.errors import UserError, quieten, run_verb

EXAMPLES = """examples:
  gritlm prepare pairs.csv out/ --instruction 'Given a question, retrieve passages that answer it'
  gritlm prepare triples.tsv out/ --no_header --held_out 1000                       MS MARCO: query, positive, negative
  gritlm prepare beir/scifact out/ --split train
  gritlm prepare hub:sentence-transformers/natural-questions out/ --licence cc-by-sa-3.0 --held_out 500
  TRAIN_DATA=out/train MODEL_NAME_OR_PATH=... bash scripts/training/train_embonly.sh"""

# The first of these names that a file has is taken.
QUERY = ("query", "anchor", "question", "sentence1", "claim", "title")
POSITIVE = ("positive", "pos", "passage", "answer", "document", "sentence2", "positives", "text", "response")
NEGATIVE = ("negative", "neg", "negatives", "hard_negatives")

csv.field_size_limit(1 << 30)


@dataclass
class Row:
    """One query as it was found; `where` names file and line."""

    where: str
    query: object
    positives: list
    negatives: list


# ---- reading


def read_columns(path: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of a file of columns, one positive each or lists of them."""
    records = _records(path, args.no_header)
    try:
        where, first = next(records)
    except StopIteration:
        raise UserError(f"{path}: found no row, wanted at least one") from None
    yield from _rows(_chain(where, first, records), path, list(first), args)


def _chain(where: str, first: dict, rest: Iterator) -> Iterator[tuple[str, dict]]:
    yield where, first
    yield from rest


def _rows(records: Iterable[tuple[str, dict]], path, columns: list[str], args: argparse.Namespace) -> Iterator[Row]:
    query = _column(columns, args.query_column, QUERY, "query", path)
    positive = _column([c for c in columns if c != query], args.positive_column, POSITIVE, "positive", path)
    if args.negative_columns:
        negatives = [_column(columns, name, (), "negative", path) for name in args.negative_columns]
    else:
        numbered = tuple(f"{name}_{number}" for name in NEGATIVE[:1] for number in range(100))
        negatives = [name for name in columns if name in (*NEGATIVE, *numbered)]
    for where, record in records:
        found = [item for name in negatives for item in _as_list(record.get(name)) if item not in (None, "")]
        yield Row(where, record.get(query), _as_list(record.get(positive)), found)


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def _column(columns: list[str], asked: str | None, usual: tuple[str, ...], what: str, path) -> str:
    if asked is not None and asked in columns:
        return asked
    if asked is None and (found := [name for name in usual if name in columns]):
        return found[0]
    wanted = f"a column {asked!r}" if asked else f"one of {', '.join(usual)}"
    raise UserError(
        f"{path}: found the columns {', '.join(columns)}; wanted {wanted} for the {what} (--{what}_column"
        + ("s)" if what == "negative" else ")")
    )


def _records(path: Path, no_header: bool) -> Iterator[tuple[str, dict]]:
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        yield from _separated(path, "\t" if name.endswith(".tsv") else ",", no_header)
        return
    for block in read_blocks(path):
        for number, raw in block:
            row = decode(path, number, raw)
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: found {json.dumps(row)[:60]}, wanted an object with named fields")
            yield f"{path}:{number}", row


def _separated(path: Path, separator: str, no_header: bool) -> Iterator[tuple[str, dict]]:
    opener = gzip.open if path.name.endswith(".gz") else open
    # Tab-separated files quote nothing: a quotation mark is a character.
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=separator, quoting=quoting, strict=separator == ",")
        header: list[str] | None = None
        try:
            for values in reader:
                if header is None:
                    header = ["query", "positive", "negative"][: len(values)] if no_header else values
                    if len(header) < 2 or len(header) < len(values):
                        raise UserError(f"{path}:1: found {len(values)} columns, wanted 2 or 3 without a header")
                    if not no_header:
                        continue
                if not values:
                    continue
                if len(values) != len(header):
                    raise UserError(
                        f"{path}:{reader.line_num}: found {len(values)} columns, wanted {len(header)} as in line 1"
                    )
                yield f"{path}:{reader.line_num}", dict(zip(header, values, strict=True))
        except (csv.Error, UnicodeDecodeError, EOFError) as error:
            raise UserError(f"{path}:{reader.line_num + 1}: found {error}, wanted {name_of(separator)}") from error


def name_of(separator: str) -> str:
    return "tab-separated UTF-8 text" if separator == "\t" else "comma-separated UTF-8 text"


def read_beir(folder: Path, split: str) -> Iterator[Row]:
    """One row a query of the split, with every document of a relevance above 0."""
    qrels = folder / "qrels" / f"{split}.tsv"
    if not qrels.is_file():
        found = ", ".join(sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))) or "none"
        raise UserError(f"{qrels}: no such file; found the splits {found} (--split)")
    texts = {
        side: {str(row.get("_id")): row for _, row in _records(folder / f"{side}.jsonl", False)}
        for side in ("queries", "corpus")
    }
    relevant: dict[str, list[str]] = {}
    where: dict[str, str] = {}
    for number, line in enumerate(qrels.read_text(encoding="utf-8").splitlines(), start=1):
        parts = line.split("\t")
        if number == 1 and parts[-1].strip().lower() == "score":
            continue
        try:
            query, document, score = parts
            score = float(score)
        except ValueError as error:
            raise UserError(f"{qrels}:{number}: found {line[:60]!r}, wanted query-id, corpus-id and score") from error
        for key, side in ((query, "queries"), (document, "corpus")):
            if key not in texts[side]:
                raise UserError(f"{qrels}:{number}: found the id {key!r}, wanted one of {folder / side}.jsonl")
        if score > 0:
            relevant.setdefault(query, []).append(document)
            where.setdefault(query, f"{qrels}:{number}")
    for query, documents in relevant.items():
        positives = []
        for document in documents:
            row = texts["corpus"][document]
            positives.append(f"{row.get('title') or ''}. {row.get('text')}" if row.get("title") else row.get("text"))
        yield Row(where[query], texts["queries"][query].get("text"), positives, [])


def read_hub(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of a data set of the Hugging Face hub, as they stream in."""
    import datasets

    try:
        data = datasets.load_dataset(name, args.config, split=args.split)
    except Exception as error:  # the library raises its own, the hub's and the network's
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"hub:{name}: cannot be read: {why[:300]}") from error
    records = ((f"hub:{name}:{number}", row) for number, row in enumerate(data, start=1))
    yield from _rows(records, f"hub:{name}", data.column_names, args)


# ---- what is kept


@dataclass
class Prepared:
    """Rows in the training format, checked, and what was left out."""

    rows: list[dict] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    repeated: int = 0
    dropped_negatives: int = 0


def prepare(found: Iterable[Row], instruction: str, skip_bad: bool) -> Prepared:
    """Check every row as training would; leave out those that stand before.

    Raises:
        UserError: at the first bad row, unless `skip_bad`.
    """
    prepared, seen = Prepared(), set()
    for row in tqdm(found, "reading", unit=" rows", delay=2):
        query = [instruction, row.query] if instruction else row.query
        made = {"query": query, "pos": row.positives, "neg": row.negatives}
        try:
            checked = parse_row(made, row.where)
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{error} (--skip_bad goes on without such rows, and lists them)") from error
            prepared.skipped.append(str(error))
            continue
        key = (checked["query_id"], *sorted(set(checked["pos_id"])))
        if key in seen:
            prepared.repeated += 1
            continue
        seen.add(key)
        prepared.dropped_negatives += checked["dropped_negatives"]
        made["neg"] = checked["neg"]["text"]
        prepared.rows.append(made)
    return prepared


def split_by_document(rows: list[dict], wanted: int, seed: int) -> tuple[list[dict], list[dict], int]:
    """(train, held out, negatives left out of train): no query and no passage stands on both sides.

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
    kept_out = {key for row in held for key in _ids(row, "pos")}
    train, left_out = [], 0
    for number, row in enumerate(rows):
        if number not in out:
            negatives = [text for text in row["neg"] if text_id(text) not in kept_out]
            left_out += len(row["neg"]) - len(negatives)
            train.append(row | {"neg": negatives})
    return train, held, left_out


def _ids(row: dict, *sides: str) -> list[int]:
    texts = [text for side in sides for text in ([row[side]] if side == "query" else row[side])]
    return [text_id(text if isinstance(text, str) else text[1]) for text in texts]


# ---- writing


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_held_out(folder: Path, rows: list[dict]) -> None:
    """A BEIR folder: the held-out queries over the held-out passages, negatives included."""
    number_of: dict[int, int] = {}
    corpus, qrels = [], ["query-id\tcorpus-id\tscore"]
    for number, row in enumerate(rows):
        for relevant, texts in ((True, row["pos"]), (False, row["neg"])):
            for text in texts:
                key = text_id(text)
                if key not in number_of:
                    number_of[key] = len(corpus)
                    corpus.append({"_id": f"d{len(corpus)}", "title": "", "text": text})
                if relevant:
                    qrels.append(f"q{number}\td{number_of[key]}\t1")
    queries = (row["query"] if isinstance(row["query"], str) else row["query"][1] for row in rows)
    write_jsonl(folder / "queries.jsonl", ({"_id": f"q{n}", "text": text} for n, text in enumerate(queries)))
    write_jsonl(folder / "corpus.jsonl", corpus)
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("\n".join(qrels) + "\n")


def card(args: argparse.Namespace, name: str, prepared: Prepared, train: list, held: list, left_out: int) -> str:
    negatives = Counter(len(row["neg"]) for row in train)
    lines = [
        f"# {name}",
        "",
        f"- source: {args.source or args.input}",
        f"- licence: {args.licence or 'unknown; look it up before you share anything made from it'}",
        f"- instruction: {args.instruction or 'none'}",
        f"- train: {len(train)} rows in `train/{name}.jsonl`, {sum(len(row['pos']) for row in train)} positives, "
        f"{min(negatives, default=0)} to {max(negatives, default=0)} negatives a row",
        f"- held out: {len(held)} queries in `held_out/` (BEIR format); no query or passage of them stands in train"
        + (f" ({left_out} negatives were left out for that)" if left_out else ""),
        f"- left out: {prepared.repeated} repeated rows, {prepared.dropped_negatives} negatives that repeat a positive "
        f"of their row, {len(prepared.skipped)} bad rows" + (" (`skipped.txt`)" if prepared.skipped else ""),
        f"- made by: `gritlm prepare`, seed {args.seed}",
    ]
    return "\n".join(lines) + "\n"


# ---- the verb


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gritlm prepare",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("input", metavar="IN", help="a BEIR folder, a file of columns, or hub:NAME")
    add("output", type=Path, metavar="OUT", help="a new folder")
    add("--name", help="of the data set; default: the input's")
    add("--instruction", default="", help="the task in a sentence; put before each query as 'Instruct: ...\\nQuery: '")
    add("--query_column", help=f"default: the first of {', '.join(QUERY)}")
    add("--positive_column", help=f"text or list of texts; default: the first of {', '.join(POSITIVE)}")
    add("--negative_columns", nargs="+", help=f"default: all of {', '.join(NEGATIVE)}, negative_1, ...")
    add("--no_header", action="store_true", help=".csv, .tsv: the columns are query, positive[, negative]")
    add("--split", default="train", help="of a BEIR folder or a hub data set, default train")
    add("--config", help="of a hub data set")
    add("--held_out", type=int, default=0, help="queries to hold out, with their passages; default 0")
    add("--seed", type=int, default=0, help="of the held-out draw")
    add("--skip_bad", action="store_true", help="leave bad rows out and list them in skipped.txt")
    add("--source", help="for the card; default: IN")
    add("--licence", help="for the card")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    quieten()
    if args.output.exists():
        raise UserError(f"{args.output} exists; nothing is overwritten, name a new folder")
    path = Path(args.input.removeprefix("hub:"))
    name = args.name or path.name.split(".")[0]
    if args.input.startswith("hub:"):
        found = read_hub(args.input.removeprefix("hub:"), args)
    elif path.is_dir():
        found = read_beir(path, args.split)
    elif path.exists():
        found = read_columns(path, args)
    else:
        raise UserError(f"{path}: no such file or folder (a data set of the hub is hub:NAME)")
    instruction = f"Instruct: {args.instruction}\nQuery: " if args.instruction else ""
    prepared = prepare(found, instruction, args.skip_bad)
    train, held, left_out = split_by_document(prepared.rows, args.held_out, args.seed)
    if not train:
        raise UserError(f"{args.input}: found no good row to train on")

    aside = args.output.with_name(args.output.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    write_jsonl(aside / "train" / f"{name}.jsonl", train)
    if held:
        write_held_out(aside / "held_out", held)
    if prepared.skipped:
        (aside / "skipped.txt").write_text("\n".join(prepared.skipped) + "\n")
    (aside / "README.md").write_text(card(args, name, prepared, train, held, left_out))
    os.replace(aside, args.output)
    print((args.output / "README.md").read_text(), end="")
    print(f"to train on it: TRAIN_DATA={args.output / 'train'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_verb(main))
