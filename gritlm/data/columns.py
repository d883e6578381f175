"""Rows of columns to examples: the columns are chosen (`roles`), then each row is read by them."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gritlm.data.cells import LIST_AS_TEXT, NUMBER, as_list, clip, is_instruction, is_null, is_pair, text_of
from gritlm.data.raw import BadRows, RawExample
from gritlm.data.roles import LOOKED_AT, NEGATIVE, POSITIVE, QUERY, Choice, Columns, Reading, check_late_values, choose
from gritlm.data.shapes import ARRAYS, Shape, find_shape, normal
from gritlm.data.tables import read_rows
from gritlm.errors import UserError

__all__ = ("NEGATIVE", "POSITIVE", "QUERY", "Choice", "Columns", "Reading", "examples_of", "read_columns")

SURVEYED = 10_000  # rows from which columns are chosen
SURVEYED_CHARACTERS = 1 << 25
FEW_VALUES = 20  # more different values are no label


def read_columns(
    path: Path, columns: Columns, bad: BadRows, no_header: bool = False, reading: Reading | None = None
) -> Iterator[RawExample]:
    """Read a file of named columns. A cell holds one passage or a list of passages.

    Raises:
        UserError: the file has no row or lacks a column, or a row is bad and bad rows are not skipped.
    """
    return examples_of(lambda: read_rows(path, bad, no_header), str(path), columns, bad, reading or Reading())


def examples_of(
    rows: Callable[[], Iterator[tuple[str, object]]], source: str, columns: Columns, bad: BadRows, reading: Reading
) -> Iterator[RawExample]:
    """Choose the columns of a source and read its rows. `reading` is filled before the first example.

    Args:
        rows: starts the source; yields file:line and a row, decoded: an object, or a list for bare arrays.
        source: the name for messages about the source as a whole.
    Raises:
        UserError: there is no row, a column is missing or could mean several things, or a row is bad.
    """
    examples = _read(rows(), source, columns, bad, reading)
    if columns.label is None:
        return (example for example, _ in examples)
    return _grouped(examples, columns.label, source, reading)


def _read(
    rows: Iterator[tuple[str, object]], source: str, columns: Columns, bad: BadRows, reading: Reading
) -> Iterator[tuple[RawExample, bool | None]]:
    """Yield each example, and whether its label is that of a positive."""
    reading.notes.clear()
    survey, size = [], 0
    for where, row in rows:
        survey.append((where, row))
        size += len(repr(row))
        if len(survey) >= SURVEYED or size > SURVEYED_CHARACTERS:
            break
    first = next((row for _, row in survey if isinstance(row, dict | list)), None)
    shape = ARRAYS if isinstance(first, list) else None
    if shape is None and columns.query is None and columns.positive is None:
        shape = find_shape(_first_values([row for _, row in survey if isinstance(row, dict)]))
    if shape and shape.refuse:
        raise UserError(f"{source}: found rows in the form of {shape.name}: {shape.refuse}")
    sample = [row for _, row in _shaped(survey, shape, BadRows(skip=True), Reading())]  # bad rows are told of below
    if not sample:
        list(_shaped(survey, shape, bad, reading))
        raise UserError(f"{source}: found no row, wanted at least one")
    choice = choose(source, sample, columns, shape, reading)
    known = _first_values(sample)
    others, read = Counter[str](), 0
    late: dict[str, dict[object, None]] = {name: {} for name in choice.unclear}  # column -> its first values
    rows, sample = itertools.chain(survey, rows), sample[:100]
    del survey  # it is let go as it is read
    for where, row in _shaped(rows, shape, bad, reading):
        read += 1
        for name, seen in late.items():
            if len(seen) < FEW_VALUES and isinstance(value := row.get(name), str | int | float):
                seen[value] = None
        if not row.keys() <= known.keys():
            known |= row
            choice = _choose_again(choice, where, choose(where, [*sample, known], columns, shape, reading))
        if choice.split and str(value := row.get(choice.split)).casefold() != str(columns.split).casefold():
            others[str(value)] += 1
            continue
        try:
            yield _example(where, row, choice, columns, reading)
        except UserError as error:
            bad.add(UserError(f"{where}: {error}"))
    if read > LOOKED_AT:
        check_late_values(source, late)
    values = ", ".join(sorted(others)[:5])
    if others and others.total() >= read:
        raise UserError(f"{source}: found no row whose {choice.split} is {columns.split}; found {values} (--split)")
    if others:
        reading.notes[f"rows left out whose {choice.split} is not {columns.split} but {values}"] = others.total()


def _first_values(rows: list[dict]) -> dict:
    """Each column's first value that is not empty."""
    found = {name: None for row in rows for name in row}
    return found | {name: value for row in reversed(rows) for name, value in row.items() if value not in (None, "", [])}


def _shaped(
    rows: Iterable[tuple[str, object]], shape: Shape | None, bad: BadRows, reading: Reading
) -> Iterator[tuple[str, dict]]:
    for where, row in rows:
        try:
            if not isinstance(row, list if shape is ARRAYS else dict):
                wanted = "an array of texts" if shape is ARRAYS else "an object with named fields"
                raise UserError(f"found {clip(row)}, wanted {wanted}")
            read = shape.read(row) if shape and shape.read else row
        except UserError as error:
            bad.add(UserError(f"{where}: {error}"))
            continue
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, StopIteration) as error:
            why = f"{type(error).__name__} {error}"
            bad.add(UserError(f"{where}: found {clip(row)}, wanted a row of {shape and shape.name} ({why})"))
            continue
        if read == []:
            what = "an answer (SQuAD v2)" if shape and shape.name == "SQuAD" else "a passage that is flagged"
            reading.notes[f"rows left out without {what}"] += 1
        for one in read if isinstance(read, list) else [read]:
            yield where, one


def _choose_again(choice: Choice, where: str, now: Choice) -> Choice:
    """The choice with the columns that a later row adds.

    Raises:
        UserError: more than the negatives and scores would change.
    """
    for role in ("query", "positives", "label", "split", "instruction"):
        if getattr(choice, role) != getattr(now, role):
            raise UserError(
                f"{where}: found {getattr(now, role)!r} as the {role}, and {getattr(choice, role)!r} before; name "
                "the columns (--query_column, --positive_column, --ignore_columns)"
            )
    return replace(choice, negatives=now.negatives, scores=now.scores)


# ---- one row


def _example(
    where: str, row: dict, choice: Choice, columns: Columns, reading: Reading
) -> tuple[RawExample, bool | None]:
    query = _query(row, choice, columns, reading)
    texts: dict[str, list] = {"positive": [], "negative": []}
    scores: dict[str, list | None] = {}
    labels, good = row.get(choice.label) if choice.label else None, None
    for side, names in (("positive", choice.positives), ("negative", choice.negatives)):
        kept: list[int] = []
        count = 0
        for name in names:
            if name not in row and side == "positive":
                raise UserError(f"found no column {name!r}, wanted it for the positive (found {', '.join(row)})")
            items = _items(row.get(name), name, choice, reading)
            if is_pair(items) and name in choice.flat:
                items = [items]
            elif is_pair(items) and is_instruction(items[0]):
                reading.notes["lists of two texts, read as two texts although the first ends like an instruction"] += 1
            for place, item in enumerate(items, start=count):
                if is_null(item):
                    if side == "positive":
                        raise _empty(item, name)
                    reading.notes["negatives left out: words of empty cells (nan, NULL, ...)"] += bool(item)
                    continue
                kept.append(place)
                texts[side].append(item if type(item) is str else _text(item, name, columns, reading))
            count += len(items)
        if side in choice.scores:
            scores[side] = _scores(row, choice.scores[side], choice, kept, count)
    _check_header(query, texts["positive"], choice)
    if isinstance(labels, list):
        if len(labels) != len(texts["positive"]):
            beside = f"{len(texts['positive'])} of {' + '.join(choice.positives)}"
            raise UserError(f"{choice.label}: found {len(labels)} labels, wanted one for each of {beside}")
        marked = [(text, _is_positive(label, columns)) for text, label in zip(texts["positive"], labels, strict=True)]
        below = [text for text, is_good in marked if is_good is False]
        reading.notes[f"texts whose {choice.label} is not a positive's became negatives of their query"] += len(below)
        texts["negative"] += below
        texts["positive"] = [text for text, is_good in marked if is_good]
        good = bool(texts["positive"])
    elif choice.label:
        good = _is_positive(labels, columns)
    prompt = row.get(choice.instruction) if choice.instruction else None
    instruction = prompt if isinstance(prompt, str) and not is_null(prompt) else None
    positive_scores, negative_scores = scores.get("positive"), scores.get("negative")
    found = RawExample(
        where, query, texts["positive"], texts["negative"], positive_scores, negative_scores, instruction
    )
    return found, good


def _items(value: object, name: str, choice: Choice, reading: Reading) -> list:
    if choice.decode or not isinstance(value, str):
        return as_list(value, name)
    reading.notes["cells that look like lists, read as one text"] += bool(LIST_AS_TEXT.match(value.lstrip()[:20]))
    return [value]


def _query(row: dict, choice: Choice, columns: Columns, reading: Reading) -> object:
    name = choice.query
    if name not in row:
        raise UserError(f"found no column {name!r}, wanted it for the query (found {', '.join(row)})")
    items = _items(row[name], name, choice, reading)
    if len(items) == 1 and not isinstance(items[0], list):
        if is_null(items[0]):
            raise _empty(items[0], name)
        return _text(items[0], name, columns, reading)
    if not is_pair(items):
        raise UserError(f"{name}: found a list of {len(items)}, wanted one text or [instruction, text]")
    if name not in choice.flat and not items[0].endswith((" ", "\n")):
        hint = "in [instruction, text] the instruction ends in a space or line break, and a query is one text"
        raise UserError(f"{name}: found a list of two texts, wanted a text: {hint}")
    return _spaced(items, reading)


def _check_header(query: object, positives: list, choice: Choice) -> None:
    """Refuse a row that holds the names of the columns, or the line below the header of a Markdown table."""
    positive = positives[0] if positives else None
    if not isinstance(query, str) or not isinstance(positive, str) or len(query) > 30:
        return
    if {*query, *positive} <= {*"-: |"}:
        raise UserError(f"found {query!r} and {positive!r}, the line below a header, wanted texts; take it out")
    names = (query == choice.query or normal(query) in QUERY, positive == choice.positives[0])
    if names[0] and (names[1] or normal(positive) in POSITIVE):
        raise UserError(
            f"found {query!r} and {positive!r}, the names of columns (a header?), wanted texts; take it out"
        )


def _empty(item: object, name: str) -> UserError:
    word = f"{item!r}, the word of an empty cell" if item else "null" if item is None else "an empty text"
    return UserError(f"{name}: found {word}, wanted a text")


def _text(item: object, name: str, columns: Columns, reading: Reading) -> object:
    return _spaced(item, reading) if is_pair(item) else text_of(item, name, columns.accept_numbers)


def _spaced(pair: Any, reading: Reading) -> list[str]:
    instruction, text = pair
    if not instruction or instruction[-1:].isspace():
        return [instruction, text]
    reading.notes["instructions that ended without white space got a space"] += 1
    return [f"{instruction} ", text]


def _scores(row: dict, name: str, choice: Choice, kept: list[int], count: int) -> list | None:
    """The scores of the texts kept of one side, from a column of it or from {"pos": ..., "neg": ...}."""
    column, _, side = name.partition(".")
    value = row.get(name) if name in row else row.get(column)
    value = value.get(side) if side and isinstance(value, dict) else value
    found = [] if value is None else as_list(value, name)
    if value is not None and len(found) != count:
        raise UserError(f"{name}: found {len(found)} scores, wanted one for each of {count} texts")
    if choice.decode:
        found = [float(score) if isinstance(score, str) and NUMBER.fullmatch(score) else score for score in found]
    return None if value is None else [found[place] for place in kept]


# ---- labels


def _is_positive(label: object, columns: Columns) -> bool | None:
    """Whether a label is that of a positive; None for a pair without a label ("-" and -1 in NLI sets)."""
    number = _number(label)
    if columns.positive_labels is not None:
        wanted = {_number(word) for word in columns.positive_labels}
        return None if number in (-1, "-") and number not in wanted else number in wanted
    if not isinstance(number, float):
        raise UserError(f"{columns.label}: found {label!r}, wanted a number (--positive_labels takes words)")
    if columns.positive_above is None and number not in (0, 1):
        raise UserError(f"{columns.label}: found {label!r}, wanted 0 or 1, or --positive_above NUMBER")
    return number > (columns.positive_above or 0)


def _number(label: object) -> object:
    """A label as a number, or its word in lower case."""
    if is_null(label):
        raise UserError(f"found {label!r} as the label, wanted one")
    word = str(label).strip().casefold()
    try:
        return {"true": 1.0, "false": 0.0}[word] if word in ("true", "false") else float(word)
    except ValueError:
        return word


def _grouped(
    examples: Iterator[tuple[RawExample, bool | None]], label: str, source: str, reading: Reading
) -> Iterator[RawExample]:
    """Rows with equal queries that follow one another become one: what the label calls no positive is a negative."""
    merged = None
    for _, group in itertools.groupby(examples, key=lambda item: repr(item[0].query)):
        rows = list(group)
        good = [example for example, is_good in rows if is_good]
        below = [example for example, is_good in rows if is_good is False]
        reading.notes[f"rows left out without a {label}"] += len(rows) - len(good) - len(below)
        kind = "became negatives of their query" if good else "left out, as no positive of their query is beside them"
        reading.notes[f"rows whose {label} is not a positive's {kind}"] += len(below)
        if good:
            negatives = [text for example in below for text in example.positives]
            negatives += [text for example, _ in rows for text in example.negatives]
            merged = replace(good[0], positives=[text for example in good for text in example.positives])
            yield replace(merged, negatives=negatives, positive_scores=None, negative_scores=None)
    if merged is None:
        raise UserError(f"{source}: found no row whose {label} is a positive's (--positive_labels, --positive_above)")
