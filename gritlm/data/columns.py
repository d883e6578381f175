"""Rows of columns to examples: the columns are chosen (`roles`), then each row is read by them."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from gritlm.data.cells import LIST_AS_TEXT, NUMBER, as_list, clip, is_instruction, is_null, is_pair, text_of
from gritlm.data.labels import normal
from gritlm.data.raw import BadRows, Columns, RawExample, Reading
from gritlm.data.roles import LOOKED_AT, POSITIVE, QUERY, Choice, check_late_values, choose
from gritlm.data.shapes import ARRAYS, Shape, find_shape
from gritlm.errors import UserError

SURVEYED = 10_000  # rows from which columns are chosen
SURVEYED_CHARACTERS = 1 << 25
FEW_VALUES = 20  # more different values are no label


def examples_of(
    rows: Iterable[tuple[str, object]], source: str, columns: Columns, bad: BadRows, reading: Reading
) -> Iterator[RawExample]:
    """Choose the columns of a source and read its rows. `reading` is filled before the first example.

    Args:
        rows: file:line and a row, decoded: an object, or a list for bare arrays. A cell of it holds one passage or a
            list of passages.
        source: the name for messages about the source as a whole.
    Raises:
        UserError: there is no row, a column is missing or could mean several things, or a row is bad.
    """
    examples = _read(iter(rows), source, columns, bad, reading)
    return _grouped(examples, columns.label, source, reading) if columns.label else examples


def _read(
    rows: Iterator[tuple[str, object]], source: str, columns: Columns, bad: BadRows, reading: Reading
) -> Iterator[RawExample]:
    survey, size = [], 0
    for where, row in rows:
        survey.append((where, row))
        size += len(repr(row))
        if len(survey) >= SURVEYED or size > SURVEYED_CHARACTERS:
            break
    shape = _shape_of([row for _, row in survey], source, columns)
    sample = [row for _, row in _shaped(survey, shape, BadRows(skip=True), Reading())]  # bad rows are told of below
    if not sample:
        list(_shaped(survey, shape, bad, reading))
        raise UserError(f"{source}: found no row, wanted at least one")
    reader = _RowReader(choose(source, sample, columns, shape, reading), columns, reading)
    known = _first_values(sample)
    others, read = Counter[str](), 0
    late: dict[str, dict[object, None]] = {name: {} for name in reader.choice.unclear}  # column -> its first values
    rows, sample = itertools.chain(survey, rows), sample[:100]
    del survey  # it is let go as it is read
    for where, row in _shaped(rows, shape, bad, reading):
        read += 1
        for name, seen in late.items():
            if len(seen) < FEW_VALUES and isinstance(value := row.get(name), str | int | float):
                seen[value] = None
        if not row.keys() <= known.keys():
            known |= row
            reader.extend(where, choose(where, [*sample, known], columns, shape, reading))
        split = reader.choice.split
        if split and str(value := row.get(split)).casefold() != str(columns.split).casefold():
            others[str(value)] += 1
            continue
        try:
            yield reader.read(where, row)
        except UserError as error:
            bad.add(UserError(f"{where}: {error}"))
    if read > LOOKED_AT:
        check_late_values(source, late)
    values = ", ".join(sorted(others)[:5])
    if others and others.total() >= read:
        raise UserError(f"{source}: found no row whose {split} is {columns.split}; found {values}")
    if others:
        reading.notes[f"rows left out whose {split} is not {columns.split} but {values}"] = others.total()


def _shape_of(survey: list, source: str, columns: Columns) -> Shape | None:
    first = next((row for row in survey if isinstance(row, dict | list)), None)
    if isinstance(first, list):
        return ARRAYS
    if columns.query or columns.positive:
        return None
    shape = find_shape(_first_values([row for row in survey if isinstance(row, dict)]))
    if shape and shape.refuse:
        raise UserError(f"{source}: found rows in the form of {shape.name}: {shape.refuse}")
    return shape


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


class _RowReader:
    """Reads rows by the columns that were chosen."""

    def __init__(self, choice: Choice, columns: Columns, reading: Reading):
        self.choice, self.columns, self.notes = choice, columns, reading.notes

    def extend(self, where: str, now: Choice) -> None:
        """Read the negatives and scores that a later row adds.

        Raises:
            UserError: more than these would change.
        """
        for role in ("query", "positives", "label", "split", "instruction", "score"):
            if getattr(self.choice, role) != getattr(now, role):
                raise UserError(
                    f"{where}: found {getattr(now, role)!r} as the {role}, and {getattr(self.choice, role)!r} before; "
                    "name the columns (--query_column, --positive_column, --ignore_columns)"
                )
        self.choice = replace(self.choice, negatives=now.negatives, scores=now.scores)

    def read(self, where: str, row: dict) -> RawExample:
        choice = self.choice
        query = self._query(row)
        positives, positive_scores = self._side(row, "positive", choice.positives)
        negatives, negative_scores = self._side(row, "negative", choice.negatives)
        self._check_header(query, positives)
        label, good = row.get(choice.label) if choice.label else None, None
        if isinstance(label, list):
            if len(label) != len(positives):
                beside = f"{len(positives)} of {' + '.join(choice.positives)}"
                raise UserError(f"{choice.label}: found {len(label)} labels, wanted one for each of {beside}")
            marks = [_is_positive(one, self.columns) for one in label]
            below = [text for text, mark in zip(positives, marks, strict=True) if mark is False]
            self.notes[f"texts whose {choice.label} is not a positive's became negatives of their query"] += len(below)
            negatives += below
            positives = [text for text, mark in zip(positives, marks, strict=True) if mark]
            good = bool(positives)
        elif choice.label:
            good = _is_positive(label, self.columns)
        prompt = row.get(choice.instruction) if choice.instruction else None
        instruction = prompt if isinstance(prompt, str) and not is_null(prompt) else None
        score = _pair_score(row.get(choice.score), choice.score) if choice.score else None
        scores = positive_scores, negative_scores, score
        return RawExample(where, query, positives, negatives, *scores, instruction, good)

    def _query(self, row: dict) -> object:
        name = self.choice.query
        items = self._items(row, name, "query")
        if len(items) == 1 and not isinstance(items[0], list):
            if is_null(items[0]):
                raise _empty(items[0], name)
            return text_of(items[0], name, self.columns.accept_numbers)
        if not is_pair(items):
            raise UserError(f"{name}: found a list of {len(items)}, wanted one text or [instruction, text]")
        if name not in self.choice.flat and not items[0].endswith((" ", "\n")):
            hint = "in [instruction, text] the instruction ends in a space or line break, and a query is one text"
            raise UserError(f"{name}: found a list of two texts, wanted a text: {hint}")
        return self._spaced(items)

    def _side(self, row: dict, side: str, names: list[str]) -> tuple[list, list | None]:
        """The positives or the negatives, and their scores."""
        found: list = []
        kept: list[int] = []  # places of the texts among the items
        count = 0
        for name in names:
            items = self._items(row, name, side)
            if is_pair(items) and name in self.choice.flat:
                items = [items]
            elif is_pair(items) and is_instruction(items[0]):
                self.notes["lists of two texts, read as two texts although the first ends like an instruction"] += 1
            for place, item in enumerate(items, start=count):
                if not is_null(item):
                    kept.append(place)
                    text = self._spaced(item) if is_pair(item) else item
                    found.append(text_of(text, name, self.columns.accept_numbers))
                elif side == "positive":
                    raise _empty(item, name)
                else:
                    self.notes["negatives left out: words of empty cells (nan, NULL, ...)"] += bool(item)
            count += len(items)
        return found, self._scores(row, self.choice.scores.get(side), kept, count)

    def _items(self, row: dict, name: str, role: str) -> list:
        if name not in row and role != "negative":
            raise UserError(f"found no column {name!r}, wanted it for the {role} (found {', '.join(row)})")
        value = row.get(name)
        if self.choice.decode or not isinstance(value, str):
            return as_list(value, name)
        self.notes["cells that look like lists, read as one text"] += bool(LIST_AS_TEXT.match(value.lstrip()[:20]))
        return [value]

    def _spaced(self, pair: Any) -> list[str]:
        instruction, text = pair
        if not instruction or instruction[-1:].isspace():
            return [instruction, text]
        self.notes["instructions that ended without white space got a space"] += 1
        return [f"{instruction} ", text]

    def _scores(self, row: dict, name: str | None, kept: list[int], count: int) -> list | None:
        """The scores of the texts kept of one side, from a column of it or from {"pos": ..., "neg": ...}."""
        if name is None:
            return None
        column, _, side = name.partition(".")
        value = row.get(name) if name in row else row.get(column)
        value = value.get(side) if side and isinstance(value, dict) else value
        if value is None:
            return None
        if self.choice.decode and isinstance(value, str):
            value = [float(part) if NUMBER.fullmatch(part) else part for part in re.split(r",\s*", value.strip("[] "))]
        scores = as_list(value, name)
        if len(scores) != count:
            raise UserError(f"{name}: found {len(scores)} scores, wanted one for each of {count} texts")
        return [scores[place] for place in kept]

    def _check_header(self, query: object, positives: list) -> None:
        """Refuse a row that holds the names of the columns, or the line below the header of a Markdown table."""
        if not positives or not isinstance(query, str) or not isinstance(positives[0], str) or len(query) > 30:
            return
        found = f"found {query!r} and {positives[0]!r}"
        if {*query, *positives[0]} <= {*"-: |"}:
            raise UserError(f"{found}, the line below a header, wanted texts; take it out")
        is_name = positives[0] == self.choice.positives[0] or normal(positives[0]) in POSITIVE
        if is_name and (query == self.choice.query or normal(query) in QUERY):
            raise UserError(f"{found}, the names of columns (a header?), wanted texts; take it out")


def _pair_score(value: object, name: str) -> float:
    try:
        score = math.nan if isinstance(value, bool) or value is None else float(str(value))
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise UserError(f"{name}: found {value!r:.60}, wanted a number, how alike the two texts are")
    return score


def _empty(item: object, name: str) -> UserError:
    word = f"{item!r}, the word of an empty cell" if item else "null" if item is None else "an empty text"
    return UserError(f"{name}: found {word}, wanted a text")


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


def _grouped(examples: Iterator[RawExample], label: str, source: str, reading: Reading) -> Iterator[RawExample]:
    """Rows with equal queries that follow one another become one: what the label calls no positive is a negative."""
    found = False
    for _, group in itertools.groupby(examples, key=lambda example: repr(example.query)):
        rows = list(group)
        good = [example for example in rows if example.is_positive]
        below = [example for example in rows if example.is_positive is False]
        reading.notes[f"rows left out without a {label}"] += len(rows) - len(good) - len(below)
        kind = "became negatives of their query" if good else "left out, as no positive of their query is beside them"
        reading.notes[f"rows whose {label} is not a positive's {kind}"] += len(below)
        if good:
            found = True
            positives = [text for example in good for text in example.positives]
            negatives = [text for example in below for text in example.positives]
            negatives += [text for example in rows for text in example.negatives]
            one = replace(good[0], positives=positives, negatives=negatives)
            yield replace(one, positive_scores=None, negative_scores=None)
    if not found:
        raise UserError(f"{source}: found no row whose {label} is a positive's (--positive_labels, --positive_above)")
