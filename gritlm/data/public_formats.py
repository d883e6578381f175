"""Read public data row by row: files of columns, BEIR folders, data sets of the Hugging Face hub."""

import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gritlm.data.folders import SUFFIXES
from gritlm.data.rows import decode, read_blocks
from gritlm.errors import UserError, one_line

# Usual column names, by preference.
QUERY = ("query", "anchor", "question", "sentence1", "claim", "title")
POSITIVE = ("positive", "pos", "passage", "answer", "document", "sentence2", "positives", "text", "response")
NEGATIVE = ("negative", "neg", "negatives", "hard_negatives")
ENDINGS = (*SUFFIXES, ".csv", ".csv.gz", ".tsv", ".tsv.gz")

csv.field_size_limit(1 << 30)


@dataclass
class RawExample:
    """One query with its passages, not yet checked; `where` is file:line."""

    where: str
    query: object
    positives: list[object]
    negatives: list[object]


@dataclass
class BadRows:
    """The errors of bad rows: raised at once with `hint` appended, or collected where bad rows are skipped."""

    skip: bool = False
    hint: str = ""
    messages: list[str] = field(default_factory=list)

    def add(self, error: UserError) -> None:
        if not self.skip:
            raise UserError(f"{error}{self.hint}") from error
        self.messages.append(str(error))


@dataclass
class Columns:
    """The columns to read; None: the first usual name that the file has."""

    query: str | None = None
    positive: str | None = None
    negatives: list[str] | None = None


def read_columns(path: Path, columns: Columns, bad: BadRows, no_header: bool = False) -> Iterator[RawExample]:
    """Read a .csv, .tsv, .jsonl or .parquet file, gzip too. A cell holds one passage or a list of passages.

    Raises:
        UserError: the file has no row or lacks a column, or a row is bad and bad rows are not skipped.
    """
    rows = read_rows(path, bad, no_header)
    try:
        where, first = next(rows)
    except StopIteration:
        raise UserError(f"{path}: found no row, wanted at least one") from None
    yield from _examples(itertools.chain([(where, first)], rows), str(path), list(first), columns)


def _examples(
    rows: Iterable[tuple[str, dict]], source: str, names: list[str], columns: Columns
) -> Iterator[RawExample]:
    query = _choose(names, columns.query, QUERY, "query", source)
    positive = _choose([name for name in names if name != query], columns.positive, POSITIVE, "positive", source)
    asked = [_choose(names, name, (), "negative", source) for name in columns.negatives or ()]
    for where, row in rows:
        negatives = asked or [name for name in row if name in NEGATIVE or re.fullmatch(r"negative_\d+", name)]
        found = [item for name in negatives for item in _as_list(row.get(name)) if item not in (None, "")]
        yield RawExample(where, row.get(query), _as_list(row.get(positive)), found)


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _choose(names: list[str], asked: str | None, usual: tuple[str, ...], kind: str, source: str) -> str:
    if asked is not None and asked in names:
        return asked
    if asked is None and (found := [name for name in usual if name in names]):
        return found[0]
    wanted = f"a column {asked!r}" if asked else f"one of {', '.join(usual)}"
    raise UserError(
        f"{source}: found the columns {', '.join(names)}; wanted {wanted} for the {kind} (--{kind}_column"
        + ("s)" if kind == "negative" else ")")
    )


def read_rows(path: Path, bad: BadRows, no_header: bool = False) -> Iterator[tuple[str, dict]]:
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
    # In tab-separated files a quotation mark is a plain character.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, delimiter=separator, quoting=quoting, strict=separator == ",")
        header: list[str] | None = None
        line = 1  # the first line of the row: a quoted field may span several lines
        try:
            for values in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                try:
                    "".join(values).encode()
                except UnicodeEncodeError as error:
                    byte = ord(error.object[error.start]) - 0xDC00  # how surrogateescape encodes a byte
                    not_utf8 = UserError(f"{where}: found byte 0x{byte:02X}, wanted UTF-8 text")
                    if header is None:
                        raise not_utf8 from error
                    bad.add(not_utf8)
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
                    bad.add(UserError(f"{where}: found {len(values)} columns, wanted {len(header)} as in line 1"))
                    continue
                yield where, dict(zip(header, values, strict=True))
        except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
            kind = "tab" if separator == "\t" else "comma"
            raise UserError(f"{path}:{line}: found {error}, wanted {kind}-separated UTF-8 text") from error


def read_beir(folder: Path, split: str, bad: BadRows) -> Iterator[RawExample]:
    """Read a split of a BEIR folder: one example per query, its positives all passages with a relevance above 0.

    Raises:
        UserError: there is no such split, or a row is bad and bad rows are not skipped.
    """
    qrels = folder / "qrels" / f"{split}.tsv"
    if not qrels.is_file():
        found = ", ".join(sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))) or "none"
        raise UserError(f"{qrels}: no such file; found the splits {found} (--split)")
    texts = {kind: {key: row for _, key, row in read_by_id(folder, kind, bad)} for kind in ("queries", "corpus")}
    relevant: dict[str, list[str]] = {}
    where: dict[str, str] = {}
    for number, query, passage, score in read_qrels(qrels, bad):
        missing = [(key, kind) for key, kind in ((query, "queries"), (passage, "corpus")) if key not in texts[kind]]
        for key, kind in missing:
            bad.add(UserError(f"{qrels}:{number}: found the id {key!r}, wanted one of {folder / kind}.jsonl"))
        if score > 0 and not missing:
            relevant.setdefault(query, []).append(passage)
            where.setdefault(query, f"{qrels}:{number}")
    for query, passages in relevant.items():
        positives = [_passage(texts["corpus"][passage]) for passage in passages]
        yield RawExample(where[query], texts["queries"][query].get("text"), positives, [])


def read_by_id(folder: Path, kind: str, bad: BadRows) -> Iterator[tuple[str, str, dict]]:
    """Yield file:line, id and row of the queries or of the corpus of a BEIR folder.

    Raises:
        UserError: there is no such file or more than one, or a row is bad and bad rows are not skipped.
    """
    files = [path for path in sorted(folder.glob(f"{kind}.*")) if path.name.endswith(ENDINGS)]
    if len(files) != 1:
        found = " and ".join(path.name for path in files) or f"no {kind}.jsonl"
        raise UserError(f"{folder}: found {found}, wanted corpus.jsonl, queries.jsonl and qrels/, each once")
    seen = set()
    for where, row in read_rows(files[0], bad):
        given = row.get("_id", row.get("id"))
        key = str(given)
        if given in (None, ""):
            bad.add(UserError(f"{where}: found the keys {', '.join(row)}, wanted _id and text"))
        elif key in seen:
            bad.add(UserError(f"{where}: found the _id {key!r} a second time, wanted it once"))
        else:
            seen.add(key)
            yield where, key, row


def _passage(row: dict) -> object:
    title, text = row.get("title"), row.get("text")
    return f"{title} {text}" if title and isinstance(text, str) else text  # like models.text.titled, but unchecked


def read_qrels(path: Path, bad: BadRows) -> Iterator[tuple[int, str, str, float]]:
    """Yield line number, query id, passage id and relevance of each line of a qrels file, gzip too.

    It has BEIR's three columns, with any header or none, or TREC's four.

    Raises:
        UserError: the file is not UTF-8, or a line is bad and bad rows are not skipped.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: found {error}, wanted tab-separated UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        parts = line.split("\t")
        if len(parts) == 1 and len(trec := line.split()) == 4:
            parts = trec
        if len(parts) == 4:
            parts = [parts[0], *parts[2:]]
        if not line.strip() or (number == 1 and len(parts) == 3 and not re.search(r"\d", line)):
            continue
        try:
            query, passage, score = parts
            found = number, query, passage, float(score)
        except ValueError:
            wanted = "wanted query-id, corpus-id and score, with tabs between them"
            bad.add(UserError(f"{path}:{number}: found {line[:60]!r}, {wanted}"))
            continue
        yield found


def read_hub(name: str, config: str | None, split: str, columns: Columns) -> Iterator[RawExample]:
    """Download a data set of the Hugging Face hub and read its rows.

    Raises:
        UserError: the data set cannot be loaded or lacks a column.
    """
    import datasets
    from huggingface_hub import constants

    from gritlm.models.hub import ask

    reason = ask(name, "dataset")
    if reason:  # what is in the cache is read all the same, at once
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # errors of the library, the hub and the network have no common class
        why = "; ".join(filter(None, (reason, one_line(error))))
        raise UserError(f"hub:{name}: cannot be read: {why[:300]}") from error
    rows = ((f"hub:{name}:{number}", row) for number, row in enumerate(data, start=1))
    yield from _examples(rows, f"hub:{name}", data.column_names, columns)
