"""Read the relevance judgements of a BEIR folder, in the forms that people have them."""

import io
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from gritlm.data.containers import FileError, file_errors, kind_of, open_stream
from gritlm.data.labels import is_split
from gritlm.data.raw import BadRows
from gritlm.data.tables import COMPRESSED, ending, objects, read_rows
from gritlm.errors import UserError

# Usual names of the fields, by preference.
QUERY_IDS = ("query-id", "query_id", "qid", "query")
PASSAGE_IDS = ("corpus-id", "corpus_id", "doc-id", "doc_id", "docid", "passage-id", "passage_id", "pid", "document_id")
GRADES = (
    *("score", "relevance", "rel", "grade", "label", "judgement", "judgment", "gain", "is_relevant", "relevancy"),
    *("relevance_score", "relevance-score", "relevance_grade", "relevance_label"),
)
# Columns of numbers that are no relevance, with or without a name.
NO_GRADE = re.compile(r"|index|__index_level_0__|unnamed: 0|column 1|q0|iter|iteration|rank")
NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?", re.I)
SHARD = re.compile(r"-\d+(-of-\d+|-[0-9a-f]{8,})?$")
# The columns of a qrels file without a header, by their number.
UNNAMED = {3: ("query-id", "corpus-id", "score"), 4: ("query-id", "iteration", "corpus-id", "score")}
Judgement = tuple[str, str, str, float]  # file:line, query id, passage id, relevance


def stem_of(path: Path) -> str:
    """A file's name in lower case, without its ending and that of its compression."""
    return Path(COMPRESSED.sub("", path.name)).stem.casefold()


def clean_id(value: object) -> str:
    """An id as a text that can be written and compared."""
    text = str(value)
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()  # half a surrogate pair too


def read_qrels(path: Path, bad: BadRows) -> Iterator[Judgement]:
    """Yield file:line, query id, passage id and relevance of each judgement. Repeated ones are yielded again.

    A text file has BEIR's three columns, with any header or none, or TREC's four. Named columns, as of parquet and
    JSON lines, have usual names. The score has one too, or is the only other column of numbers. Each judgement counts
    as 1 where there are the two columns of ids alone.

    Raises:
        UserError: the file cannot be read, has no column that is the score for certain or rows of several splits, or a
            line is bad and bad rows are not skipped.
    """
    split = SHARD.sub("", stem_of(path))
    named = kind_of(path) == "parquet" or ending(path) in (".jsonl", ".ndjson", ".json")
    first: dict | None = None
    for where, row in objects(read_rows(path, bad), bad) if named else _qrels_lines(path):
        if first is None and any(row):
            first, (query, passage, grade) = row, _choose(row, where)
            splits = [name for name in row if is_split(name)]
        try:
            if first is None or row.keys() != first.keys():
                raise ValueError("another number of columns")
            number = float(row[grade]) if grade else 1.0
            if "" in (row[query], row[passage]) or None in (row[query], row[passage]) or not math.isfinite(number):
                raise ValueError("no id, or no number")
        except (TypeError, ValueError):
            found = "\t".join(map(str, row.values()))[:60]
            wanted = "wanted query-id, corpus-id and score, with tabs between them"
            bad.add(UserError(f"{where}: found {found!r}, {wanted}"))
            continue
        for name in splits:
            if str(row[name]).strip().casefold() != split:
                wanted = f"wanted {split} in each row of this file; write one file for each split"
                raise FileError(f"{where}: found {str(row[name])!r} in the column {name}, {wanted}")
        yield where, clean_id(row[query]), clean_id(row[passage]), number


def _usual(columns: Iterable[str], usual: Iterable[str]) -> list[str]:
    """The columns that have a usual name, by preference."""
    folded = {name.strip().casefold(): name for name in columns}
    return [folded[name] for name in usual if name in folded]


def _choose(row: dict, where: str) -> tuple[str, str, str]:
    """The columns of query, passage and score ("" for none), which has any name if it is the only one of numbers.

    Raises:
        FileError: a column is missing, or several could be the score.
    """
    queries, passages, grades = (_usual(row, usual) for usual in (QUERY_IDS, PASSAGE_IDS, GRADES))
    if not queries or not passages:
        raise FileError(f"{where}: found the columns {', '.join(row)}, wanted query-id, corpus-id and score")
    others = [
        name
        for name in row
        if name not in (queries[0], passages[0])
        and not NO_GRADE.fullmatch(name.strip().casefold())
        and not is_split(name)
    ]
    if others and not grades:
        grades = [name for name in others if NUMBER.fullmatch(str(row[name])) or isinstance(row[name], bool)]
    if len(grades) > 1 or (others and not grades):
        wanted = f"wanted one that is the relevance ({', '.join(GRADES[:6])})"
        raise FileError(f"{where}: found the columns {', '.join(row)}; {wanted}")
    return queries[0], passages[0], grades[0] if grades else ""


def _qrels_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a text file; one with another number of columns has the line alone, under no name."""
    names: tuple[str, ...] = ()
    separator: str | None = None  # any white space
    try:
        with file_errors(path), open_stream(path) as stream:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), start=1):
                if line.isspace():
                    continue
                if not names:
                    separator = "\t" if "\t" in line else "," if len(line.split()) < 3 else None
                parts = [part.strip(' "\r\n') for part in line.split(separator)]
                if not names:
                    # A header has usual names, or at least no digit and so no id.
                    usual = bool(_usual(parts, QUERY_IDS) and _usual(parts, PASSAGE_IDS))
                    header = not NUMBER.fullmatch(parts[-1]) and (usual or not re.search(r"\d", line))
                    names = tuple(parts) if header and usual else UNNAMED.get(len(parts), ())
                    if not names:
                        wanted = "wanted query-id, corpus-id and score, or the four columns of TREC"
                        raise FileError(f"{path}:{number}: found {line.rstrip()[:60]!r}, {wanted}")
                    if header:
                        continue
                fits = len(parts) == len(names)
                yield f"{path}:{number}", dict(zip(names, parts, strict=True)) if fits else {"": line.strip()}
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: found {error}, wanted tab-separated UTF-8 text") from error
