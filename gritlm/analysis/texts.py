"""The texts of `gritlm hrsa`, and their labels: a plain text file, a line a text, or a table of named columns."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gritlm.data.raw import BadRows
from gritlm.data.tables import ending, read_rows
from gritlm.errors import UserError

MOST_LABELS = 20


class Texts(NamedTuple):
    """Distinct texts, their labels (strings, or float64 for a regression), and counts: rows kept, texts repeated."""

    texts: list[str]
    labels: np.ndarray | None
    rows: int
    repeats: int


def read(args: argparse.Namespace) -> Texts:
    """The texts of --texts: at most --max_texts, drawn by the seed, of the rows that --where keeps.

    Raises:
        UserError: a row has no text or no label, or no row is left.
    """
    path, conditions = args.texts, [condition.partition("=")[::2] for condition in args.where]
    if bad := [condition for condition in args.where if "=" not in condition]:
        raise UserError(f"--where: found {bad[0]!r}, wanted COLUMN=VALUE")
    if not path.is_file():
        raise UserError(f"--texts: found no file {path}, wanted a .txt, .jsonl, .json, .csv, .tsv or .parquet file")
    plain = ending(path) == ".txt"
    if plain and (args.label_column or args.where):
        raise UserError(f"--texts {path}: found plain text, wanted named columns for --label_column and --where")
    found: dict[str, Any] = {}
    count, seen = 0, ""
    for place, row in _lines(path) if plain else read_rows(path, BadRows()):
        row = {args.text_column: row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise UserError(f"{place}: found no object of named columns, wanted one with {args.text_column!r}")
        values = {name: _word(_cell(row, name, place, "--where")) for name, _ in conditions}
        seen = " ".join(f"{name}={value}" for name, value in values.items())
        if any(values[name] != value for name, value in conditions):
            continue
        text = _cell(row, args.text_column, place, "--text_column")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{place}: {args.text_column}: found {text!r}, wanted a text")
        count += 1
        label = args.label_column and _cell(row, args.label_column, place, "--label_column")
        found.setdefault(text.rstrip(), label)
    if not found:
        raise UserError(
            f"--texts {path}: found no text" + (f" that --where keeps (the last row: {seen})" if seen else "")
        )
    texts, labels, kept = list(found), list(found.values()), np.arange(len(found))
    if 0 < args.max_texts < len(texts):
        kept = np.sort(np.random.default_rng(args.seed).choice(len(texts), args.max_texts, replace=False))
    chosen = _as_labels([labels[n] for n in kept], args.label_column) if args.label_column else None
    return Texts([texts[n] for n in kept], chosen, count, count - len(found))


def _lines(path: Path) -> Iterator[tuple[str, object]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--texts {path}: found bytes that are not UTF-8 ({error.reason}), wanted UTF-8 text"
        ) from error
    yield from ((f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip())


def _cell(row: dict, name: str, place: str, flag: str) -> Any:
    if name not in row:
        raise UserError(f"{place}: {flag} {name}: found the columns {', '.join(map(str, row))}, wanted one of them")
    return row[name]


def _word(value: Any) -> str:
    """A value as a person writes it: true, not True."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _as_labels(values: list[Any], column: str) -> np.ndarray:
    """float64 where all values are numbers and not few whole ones; strings else."""
    if None in values:
        raise UserError(f"--label_column {column}: found a row without a value, wanted a label in each row")
    words = [_word(value) for value in values]
    try:
        numbers = np.array([float(word) for word in words])
    except ValueError:
        return np.array(words)
    if not np.isfinite(numbers).all():
        raise UserError(f"--label_column {column}: found a number that is not finite, wanted finite ones")
    return np.array(words) if (numbers % 1 == 0).all() and len(set(words)) <= MOST_LABELS else numbers
