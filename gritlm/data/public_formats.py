"""Public data of common shapes, row by row: columns, BEIR, data sets of the Hugging Face hub."""

import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gritlm.data.rows import decode, read_blocks
from gritlm.errors import UserError

# The first of these names that a file has is taken.
QUERY = ("query", "anchor", "question", "sentence1", "claim", "title")
POSITIVE = ("positive", "pos", "passage", "answer", "document", "sentence2", "positives", "text", "response")
NEGATIVE = ("negative", "neg", "negatives", "hard_negatives")

csv.field_size_limit(1 << 30)


@dataclass
class RawExample:
    """One query as it was found; `where` names file and line."""

    where: str
    query: object
    positives: list
    negatives: list


@dataclass
class BadRows:
    """What is wrong with rows that are left out. Unless told to `skip`, the first one is an error, with a hint."""

    skip: bool = False
    hint: str = ""
    messages: list[str] = field(default_factory=list)

    def add(self, error: UserError) -> None:
        if not self.skip:
            raise UserError(f"{error}{self.hint}") from error
        self.messages.append(str(error))


@dataclass
class Columns:
    """Which columns to take; None: by their usual names."""

    query: str | None = None
    positive: str | None = None
    negatives: list[str] | None = None


def read_columns(path: Path, columns: Columns, bad: BadRows, no_header: bool = False) -> Iterator[RawExample]:
    """Rows of a file of columns, one positive each or lists of them."""
    records = _records(path, bad, no_header)
    try:
        where, first = next(records)
    except StopIteration:
        raise UserError(f"{path}: found no row, wanted at least one") from None
    yield from _rows(itertools.chain([(where, first)], records), str(path), list(first), columns)


def _rows(records: Iterable[tuple[str, dict]], source: str, names: list[str], columns: Columns) -> Iterator[RawExample]:
    query = _choose(names, columns.query, QUERY, "query", source)
    positive = _choose([name for name in names if name != query], columns.positive, POSITIVE, "positive", source)
    asked = [_choose(names, name, (), "negative", source) for name in columns.negatives or ()]
    for where, record in records:
        negatives = asked or [name for name in record if name in NEGATIVE or re.fullmatch(r"negative_\d+", name)]
        found = [item for name in negatives for item in _as_list(record.get(name)) if item not in (None, "")]
        yield RawExample(where, record.get(query), _as_list(record.get(positive)), found)


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def _choose(names: list[str], asked: str | None, usual: tuple[str, ...], what: str, source: str) -> str:
    if asked is not None and asked in names:
        return asked
    if asked is None and (found := [name for name in usual if name in names]):
        return found[0]
    wanted = f"a column {asked!r}" if asked else f"one of {', '.join(usual)}"
    raise UserError(
        f"{source}: found the columns {', '.join(names)}; wanted {wanted} for the {what} (--{what}_column"
        + ("s)" if what == "negative" else ")")
    )


def _records(path: Path, bad: BadRows, no_header: bool = False) -> Iterator[tuple[str, dict]]:
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        yield from _separated(path, "\t" if name.endswith(".tsv") else ",", bad, no_header)
        return
    for block in read_blocks(path, columns=None):
        for number, raw in block:
            try:
                row = decode(path, number, raw)
                if not isinstance(row, dict):
                    found = json.dumps(row)[:60]
                    raise UserError(f"{path}:{number}: found {found}, wanted an object with named fields")
            except UserError as error:
                bad.add(error)
            else:
                yield f"{path}:{number}", row


def _separated(path: Path, separator: str, bad: BadRows, no_header: bool) -> Iterator[tuple[str, dict]]:
    opener = gzip.open if path.name.endswith(".gz") else open
    # Tab-separated files quote nothing: a quotation mark is a character.
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, delimiter=separator, quoting=quoting, strict=separator == ",")
        header: list[str] | None = None
        begun = 1  # the line that the row in hand begins at: a quoted field may go over several
        try:
            for values in reader:
                where, begun = f"{path}:{begun}", reader.line_num + 1
                try:
                    "".join(values).encode()
                except UnicodeEncodeError as error:
                    byte = ord(error.object[error.start]) - 0xDC00  # as surrogateescape keeps it
                    found = UserError(f"{where}: found byte 0x{byte:02X}, wanted UTF-8 text")
                    if header is None:
                        raise found from error
                    bad.add(found)
                    continue
                if header is None:
                    header = ["query", "positive", "negative"][: len(values)] if no_header else values
                    if len(header) < 2 or len(header) < len(values):
                        wanted = "2 or 3 (--no_header)" if no_header else "at least 2"
                        raise UserError(f"{path}:1: found {len(values)} columns, wanted {wanted}")
                    if twice := sorted({name for name in header if header.count(name) > 1}):
                        raise UserError(f"{path}:1: found the column {twice[0]!r} twice, wanted it once")
                    if not no_header:
                        continue
                if not values:
                    continue
                if len(values) != len(header):
                    found = f"found {len(values)} columns, wanted {len(header)} as in line 1"
                    bad.add(UserError(f"{where}: {found}"))
                    continue
                yield where, dict(zip(header, values, strict=True))
        except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}:{begun}: found {error}, wanted {name_of(separator)}") from error


def name_of(separator: str) -> str:
    return "tab-separated UTF-8 text" if separator == "\t" else "comma-separated UTF-8 text"


def read_beir(folder: Path, split: str, bad: BadRows) -> Iterator[RawExample]:
    """One row a query of the split, with every document of a relevance above 0."""
    qrels = folder / "qrels" / f"{split}.tsv"
    if not qrels.is_file():
        found = ", ".join(sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))) or "none"
        raise UserError(f"{qrels}: no such file; found the splits {found} (--split)")
    texts: dict[str, dict[str, dict]] = {"queries": {}, "corpus": {}}
    for side, known in texts.items():
        for at, row in _records(folder / f"{side}.jsonl", bad):
            key = str(row.get("_id"))
            if key in known:
                bad.add(UserError(f"{at}: found the _id {key!r} a second time, wanted it once"))
            else:
                known[key] = row
    relevant: dict[str, list[str]] = {}
    where: dict[str, str] = {}
    for number, query, document, score in read_qrels(qrels, bad):
        missing = [(key, side) for key, side in ((query, "queries"), (document, "corpus")) if key not in texts[side]]
        for key, side in missing:
            bad.add(UserError(f"{qrels}:{number}: found the id {key!r}, wanted one of {folder / side}.jsonl"))
        if score > 0 and not missing:
            relevant.setdefault(query, []).append(document)
            where.setdefault(query, f"{qrels}:{number}")
    for query, documents in relevant.items():
        positives = []
        for document in documents:
            row = texts["corpus"][document]
            title, text = row.get("title"), row.get("text")
            positives.append(f"{title} {text}" if title and isinstance(text, str) else text)  # as gritlm encode does
        yield RawExample(where[query], texts["queries"][query].get("text"), positives, [])


def read_qrels(path: Path, bad: BadRows) -> Iterator[tuple[int, str, str, float]]:
    """Line number, query's id, document's id and relevance of each line of BEIR's tab-separated file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: found {error}, wanted tab-separated UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        parts = line.split("\t")
        if not line.strip() or (number == 1 and parts[-1].strip().lower() == "score"):
            continue
        try:
            query, document, score = parts
            found = number, query, document, float(score)
        except ValueError:
            wanted = "wanted query-id, corpus-id and score, with tabs between them"
            bad.add(UserError(f"{path}:{number}: found {line[:60]!r}, {wanted}"))
            continue
        yield found


def read_hub(name: str, config: str | None, split: str, columns: Columns) -> Iterator[RawExample]:
    """Rows of a data set of the Hugging Face hub, once they are downloaded."""
    import datasets

    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises its own, the hub's and the network's
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"hub:{name}: cannot be read: {why[:300]}") from error
    records = ((f"hub:{name}:{number}", row) for number, row in enumerate(data, start=1))
    yield from _rows(records, f"hub:{name}", data.column_names, columns)
