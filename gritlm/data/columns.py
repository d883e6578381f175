"""Which column of a row is the query, which are its positives, which its negatives."""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gritlm.data.raw import BadRows, RawExample
from gritlm.data.tables import read_rows
from gritlm.errors import UserError

# Usual column names, by preference.
QUERY = ("query", "anchor", "question", "sentence1", "claim", "title")
POSITIVE = ("positive", "pos", "passage", "answer", "document", "sentence2", "positives", "text", "response")
NEGATIVE = ("negative", "neg", "negatives", "hard_negatives")


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
    yield from examples_of(itertools.chain([(where, first)], rows), str(path), list(first), columns)


def examples_of(
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
