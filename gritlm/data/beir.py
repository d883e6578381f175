"""Read BEIR folders: queries, corpus and relevance judgements, as files or as folders of shards (MTEB, NanoBEIR).

Of the corpus only the judged passages are kept, in a temporary file.
"""

import functools
import io
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import IO

import numpy as np

from gritlm.data.cells import is_null
from gritlm.data.containers import FileError, file_errors, kind_of, open_stream
from gritlm.data.raw import BadRows, RawExample
from gritlm.data.shapes import is_split
from gritlm.data.tables import COMPRESSED, TABLES, ending, objects, read_rows
from gritlm.errors import UserError
from gritlm.models.text import titled

WANTED = "wanted corpus.jsonl, queries.jsonl and qrels/, each once"
# Usual names of the fields, by preference.
QUERY_IDS = ("query-id", "query_id", "qid", "query")
PASSAGE_IDS = ("corpus-id", "corpus_id", "doc-id", "doc_id", "docid", "passage-id", "passage_id", "pid", "document_id")
GRADES = (
    *("score", "relevance", "rel", "grade", "label", "judgement", "judgment", "gain", "is_relevant", "relevancy"),
    *("relevance_score", "relevance-score", "relevance_grade", "relevance_label"),
)
NO_GRADE = re.compile(r"|index|__index_level_0__|unnamed: 0|column 1")  # columns beside the ids that may be left out
RANKS = re.compile(r"q0|iter|iteration|rank")
IDS = {"queries": ("_id", "id", "query_id", "query-id", "qid"), "corpus": ("_id", "id", *PASSAGE_IDS)}
SHARD = re.compile(r"-\d+(-of-\d+|-[0-9a-f]{8,})?$")
NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?", re.I)
# What a qrels file without a header has, by its number of columns.
UNNAMED = {3: ("query-id", "corpus-id", "score"), 4: ("query-id", "iteration", "corpus-id", "score")}
MISSING, BLANK = -1, -2  # in place of where a text begins
Judgement = tuple[str, str, str, float]  # file:line, query id, passage id, relevance


@dataclass
class BeirFolder:
    """The files of a BEIR folder; each part may consist of several shards."""

    path: Path
    queries: list[Path]
    corpus: list[Path]
    qrels: dict[str, list[Path]]  # split -> files


# ---- which files


def find_beir(root: Path) -> BeirFolder | None:
    """The BEIR folder at a path or in it, one folder down; None where there is none.

    Raises:
        UserError: a part of it is missing or is there twice, or there are several BEIR folders.
    """
    folders = [root] if is_beir(root) else [path for path in _entries(root) if path.is_dir() and is_beir(path)]
    if len(folders) > 1:
        found = ", ".join(folder.name for folder in folders)
        raise FileError(f"{root}: found the BEIR folders {found}, wanted one of them")
    for folder in folders:
        parts = _parts(folder)
        for kind in ("corpus", "queries"):
            if len(parts[kind]) != 1:
                found = " and ".join(file.name for files in parts[kind].values() for file in files)
                raise FileError(f"{folder}: found {found or f'no {kind}.jsonl'}, {WANTED}")
        (queries,), (corpus,) = parts["queries"].values(), parts["corpus"].values()
        return BeirFolder(folder, queries, corpus, parts["qrels"])
    return None


def is_beir(folder: Path) -> bool:
    """Whether a folder itself has at least two of corpus, queries and qrels."""
    return sum(map(bool, _parts(folder).values())) > 1


def _parts(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The files of corpus, queries and qrels, each by name without ending and shard."""
    parts, sharded = {}, True
    for kind in ("corpus", "queries"):
        files = [path for path in _entries(folder) if path.is_file() and ending(path) in TABLES and _stem(path) == kind]
        parts[kind] = _by_stem(files or _entries(folder / kind))
        sharded &= bool(parts[kind]) and not files
    names = ["qrels", "data", "default"] if sharded else ["qrels"]  # MTEB has several names for it
    return parts | {"qrels": next(filter(None, (_by_stem(_entries(folder / name)) for name in names)), {})}


def _entries(folder: Path) -> list[Path]:
    with file_errors(folder):
        return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def _stem(path: Path) -> str:
    return Path(COMPRESSED.sub("", path.name)).stem.casefold()


def _by_stem(paths: list[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    stems: dict[str, Path] = {}
    for file in paths:
        if file.is_file() and ending(file) in TABLES:
            if (other := stems.setdefault(_stem(file), file)) != file:
                raise FileError(f"{file.parent}: found {other.name} and {file.name}, {WANTED}")
            found.setdefault(SHARD.sub("", _stem(file)), []).append(file)
    return found


# ---- what is in the files


def read_by_id(
    files: list[Path], kind: str, bad: BadRows, notes: Counter[str] | None = None
) -> Iterator[tuple[str, str, dict]]:
    """Yield file:line, id and row of the queries or of the corpus. A repeated id is yielded again.

    A title or a text that is the word of an empty cell (nan, NULL) becomes an empty one; `notes` count the titles. The
    queries of an evaluation set, which has no `notes`, stay as they are.

    Raises:
        UserError: a file cannot be read, or a row is bad and bad rows are not skipped.
    """
    for file in files:
        for where, row in objects(read_rows(file, bad), bad):
            name = next((name for name in IDS[kind] if row.get(name) not in (None, "")), None)
            if name is None:
                bad.add(UserError(f"{where}: found the keys {', '.join(row)}, wanted _id and text"))
            else:
                for field in ("title", "text") if kind == "corpus" or notes is not None else ():
                    if isinstance(value := row.get(field), str | float) and value != "" and is_null(value):
                        row[field] = ""
                        if field == "title" and kind == "corpus" and notes is not None:
                            notes["titles left out: words of empty cells (nan, NULL, ...)"] += 1
                yield where, _id(row[name]), row


def _id(value: object) -> str:
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
    split = SHARD.sub("", _stem(path))
    choices: dict[tuple[str, ...], tuple[str, ...]] = {}  # columns -> those of query, passage and score
    named = kind_of(path) == "parquet" or ending(path) in (".jsonl", ".ndjson", ".json")
    for where, row in objects(read_rows(path, bad), bad) if named else _qrels_lines(path):
        if (columns := tuple(row)) not in choices:
            choices[columns] = _with_grade(_names(columns), row, where)
        for name in _split_columns(columns):
            if str(row[name]).strip().casefold() != split:
                wanted = f"wanted {split} in each row of this file; write one file for each split"
                raise FileError(f"{where}: found {str(row[name])!r} in the column {name}, {wanted}")
        try:
            query, passage, grade = (row[name] if name else 1 for name in choices[columns])
            number = float(grade)
            if not choices[columns][2] and any(other[2:] > ("",) for other in choices.values()):
                raise ValueError  # a row without a score among others with one
            if query in (None, "") or passage in (None, "") or not math.isfinite(number):
                raise ValueError
        except (TypeError, ValueError):
            found = "\t".join(map(str, row.values()))[:60]
            bad.add(
                UserError(f"{where}: found {found!r}, wanted query-id, corpus-id and score, with tabs between them")
            )
        else:
            yield where, _id(query), _id(passage), number


@functools.cache
def _names(columns: tuple[str, ...]) -> tuple[str, ...]:
    """The columns of query, passage and score ("" for none); () where a usual name is missing."""
    folded = {name.strip().casefold(): name for name in reversed(columns)}
    usual = (QUERY_IDS, PASSAGE_IDS, GRADES)
    found = tuple(next((folded[name] for name in names if name in folded), "") for names in usual)
    if all(found[:2]) and len(grades := [name for name in GRADES if name in folded]) > 1:
        raise FileError(f"found the columns {' and '.join(grades)}, wanted one that is the relevance")
    return found if all(found[:2]) else ()


def _with_grade(names: tuple[str, ...], row: dict, where: str) -> tuple[str, ...]:
    """The columns with that of the score, of an unusual name where it is the only one of numbers."""
    others = {name: name.strip().casefold() for name in row if name not in names}
    others = {name: key for name, key in others.items() if not (NO_GRADE.fullmatch(key) or is_split(name))}
    if not names or names[2] or not others:
        return names
    numbers = [name for name in others if NUMBER.fullmatch(str(row[name])) or isinstance(row[name], bool)]
    numbers = [name for name in numbers if not RANKS.fullmatch(others[name])]
    if len(numbers) != 1:
        wanted = f"wanted one that is the relevance ({', '.join(GRADES[:6])})"
        raise FileError(f"{where}: found the columns {', '.join(row)}; {wanted}")
    return (*names[:2], numbers[0])


@functools.cache
def _split_columns(columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(filter(is_split, columns))


def _qrels_lines(path: Path) -> Iterator[tuple[str, dict]]:
    names: tuple[str, ...] = ()
    separator: str | None = None  # any white space
    try:
        with file_errors(path), open_stream(path) as stream:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), start=1):
                if line.isspace():
                    continue
                if not names and "\t" in line:
                    separator = "\t"
                elif not names and len(line.split()) < 3:
                    separator = ","
                parts = [part.strip(' "\r\n') for part in line.split(separator)]
                if names:
                    fits = len(parts) == len(names)
                    yield f"{path}:{number}", dict(zip(names, parts, strict=True)) if fits else {"": line.strip()}
                    continue
                # A header has usual names, or at least no digit and so no id.
                header = not NUMBER.fullmatch(parts[-1]) and (_names(tuple(parts)) or not re.search(r"\d", line))
                names = tuple(parts) if header and _names(tuple(parts)) else UNNAMED.get(len(parts), ())
                if not names:
                    wanted = "wanted query-id, corpus-id and score, or the four columns of TREC"
                    raise FileError(f"{path}:{number}: found {line.rstrip()[:60]!r}, {wanted}")
                if not header:
                    yield f"{path}:{number}", dict(zip(names, parts, strict=True))
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: found {error}, wanted tab-separated UTF-8 text") from error


# ---- examples


class _Texts:
    """The judged queries or passages of a folder, on disk."""

    def __init__(self, files: list[Path], kind: str, ids: Iterable[int], spool: IO[bytes]):
        self.files, self.kind, self._spool = files, kind, spool
        self.places = dict.fromkeys(ids, MISSING)  # hash of an id -> where its text begins

    def read(self, bad: BadRows, notes: Counter[str]) -> int:
        """Read the files; returns the number of blank texts."""
        blank, end = 0, self._spool.seek(0, os.SEEK_END)
        for where, key, row in read_by_id(self.files, self.kind, bad, notes):
            if self.kind == "queries":
                row.pop("title", None)
            if "text" in row and row["text"] is None:
                row["text"] = ""
            try:
                text = titled(row, where)
                place = self.places.get(hash(key))
                if place not in (None, MISSING):
                    raise UserError(f"{where}: found the _id {key!r} a second time, wanted it once")
            except UserError as error:
                bad.add(error)
                continue
            blank += not text.strip()
            if place is not None and not text.strip():
                self.places[hash(key)] = BLANK
            elif place is not None:
                self.places[hash(key)], data = end, text.encode()
                end += self._spool.write(b"%d\n%b" % (len(data), data))
        return blank

    def text(self, key: int) -> str:
        self._spool.seek(self.places[key])
        return self._spool.read(int(self._spool.readline())).decode()


def read_beir(folder: BeirFolder, split: str | None, bad: BadRows, notes: Counter[str]) -> Iterator[RawExample]:
    """Read a split of a BEIR folder: one example per query, its positives all passages with a relevance above 0.

    The qrels are read twice. Memory holds 64-bit hashes of the judged ids; the judged texts are in a temporary file.

    Args:
        split: by default train.
        notes: counts of what is left out, complete after the last example.
    Raises:
        UserError: there is no such split, or a row is bad and bad rows are not skipped.
    """
    split = split or "train"
    if split not in folder.qrels:
        found = ", ".join(folder.qrels) or "none"
        raise FileError(f"{folder.path}/qrels/{split}.tsv: no such file; found the splits {found} (--split)")
    files = folder.qrels[split]
    query_ids, passage_ids, pairs, grades = array("q"), array("q"), array("q"), array("d")
    for _, query, passage, grade in _judgements(files, bad):
        query_ids.append(hash(query))
        passage_ids.append(hash(passage))
        pairs.append(hash((query, passage)))
        grades.append(grade)
    with file_errors(Path(gettempdir())), TemporaryFile() as spool:
        queries = _Texts(folder.queries, "queries", query_ids, spool)
        corpus = _Texts(folder.corpus, "corpus", passage_ids, spool)
        notes["blank queries, left out"] += queries.read(bad, notes)
        notes["blank passages of the corpus, left out"] += corpus.read(bad, notes)
        for texts in (queries, corpus):
            if grades and all(place == MISSING for place in texts.places.values()):
                raise FileError(f"{files[0]}: found none of its ids in {texts.files[0]}, wanted all of them")
        _, first_N, inverse_N = np.unique(np.array(pairs), return_index=True, return_inverse=True)
        grade_N, first_N = np.array(grades), first_N[inverse_N]  # the first judgement of the same pair
        again_N, differs_N = first_N != np.arange(len(grades)), grade_N != grade_N[first_N]
        notes["repeated judgements, left out"] += int((again_N & ~differs_N).sum())
        known = (queries.places[q] >= 0 and corpus.places[p] >= 0 for q, p in zip(query_ids, passage_ids, strict=True))
        used_N = np.fromiter(known, bool, len(grades)) & ~again_N & (grade_N > 0)
        groups = _groups(np.flatnonzero(used_N), np.array(query_ids)[used_N])
        asked = sum(place >= 0 for place in queries.places.values())
        notes["queries without a passage of a score above 0, left out"] += asked - len(groups)
        upcoming = iter([*groups, None])
        group = next(upcoming)
        for number, (where, query, passage, _) in enumerate(_judgements(files, BadRows(skip=True))):
            for key, texts in ((query, queries), (passage, corpus)):
                if texts.places[hash(key)] == MISSING:
                    bad.add(UserError(f"{where}: found the id {key!r}, wanted one of {texts.files[0]}"))
            if differs_N[number]:
                found = f"another score for query {query!r} and passage {passage!r} than before"
                bad.add(UserError(f"{where}: found {found}, wanted one"))
            if group is not None and group[0] == number:
                passages = [corpus.text(passage_ids[judged]) for judged in group]
                yield RawExample(where, queries.text(hash(query)), list[object](passages), [])
                group = next(upcoming)


def _judgements(files: list[Path], bad: BadRows) -> Iterator[Judgement]:
    for file in files:
        yield from read_qrels(file, bad)


def _groups(judged_N: np.ndarray, query_N: np.ndarray) -> list[np.ndarray]:
    """The judgements of each query, in order of the query's first one."""
    order = np.argsort(query_N, kind="stable")
    starts = np.flatnonzero(np.diff(query_N[order])) + 1
    groups = np.split(judged_N[order], starts) if len(judged_N) else []
    return sorted(groups, key=lambda group: group[0])
