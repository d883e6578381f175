"""Read BEIR folders: queries, corpus and relevance judgements, as files or as folders of shards (MTEB, NanoBEIR).

Of the corpus only the judged passages are kept, in a temporary file.
"""

import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import IO

from gritlm.data.cells import is_null
from gritlm.data.containers import FileError, file_errors, kind_of, open_stream
from gritlm.data.labels import is_split
from gritlm.data.raw import BadRows, RawExample
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
# Columns of numbers that are no relevance, with or without a name.
NO_GRADE = re.compile(r"|index|__index_level_0__|unnamed: 0|column 1|q0|iter|iteration|rank")
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
                continue
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
            bad.add(
                UserError(f"{where}: found {found!r}, wanted query-id, corpus-id and score, with tabs between them")
            )
            continue
        for name in splits:
            if str(row[name]).strip().casefold() != split:
                wanted = f"wanted {split} in each row of this file; write one file for each split"
                raise FileError(f"{where}: found {str(row[name])!r} in the column {name}, {wanted}")
        yield where, _id(row[query]), _id(row[passage]), number


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


# ---- examples


class _Texts:
    """The judged queries or passages of a folder, on disk.

    Args:
        ids: hashes of the judged ids.
        spool: the temporary file, shared by queries and passages.
    """

    def __init__(self, files: list[Path], kind: str, ids: Iterable[int], spool: IO[bytes]):
        self.files, self._kind, self._spool = files, kind, spool
        self.places = dict.fromkeys(ids, MISSING)  # hash of an id -> where its text begins

    def read(self, bad: BadRows, notes: Counter[str]) -> int:
        """Read the files; returns the number of blank texts."""
        blank, end = 0, self._spool.seek(0, os.SEEK_END)
        for where, key, row in read_by_id(self.files, self._kind, bad, notes):
            instruction = row.get("instruction") if self._kind == "queries" else None
            if self._kind == "queries":
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
                self.places[hash(key)] = end
                end += self._spool.write(json.dumps([text, instruction]).encode() + b"\n")
        return blank

    def get(self, key: int) -> tuple[str, str | None]:
        """A text and its instruction."""
        self._spool.seek(self.places[key])
        text, instruction = json.loads(self._spool.readline())
        return text, instruction


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
    judged: dict[int, dict[int, float]] = {}  # query -> passage -> its first grade
    for _, query, passage, grade in _judgements(files, bad):
        grades = judged.setdefault(hash(query), {})
        notes["repeated judgements, left out"] += grades.get(hash(passage)) == grade
        grades.setdefault(hash(passage), grade)
    with file_errors(Path(gettempdir())), TemporaryFile() as spool:
        queries = _Texts(folder.queries, "queries", judged, spool)
        corpus = _Texts(folder.corpus, "corpus", (key for grades in judged.values() for key in grades), spool)
        notes["blank queries, left out"] += queries.read(bad, notes)
        notes["blank passages of the corpus, left out"] += corpus.read(bad, notes)
        for texts in (queries, corpus):
            if judged and all(place == MISSING for place in texts.places.values()):
                raise FileError(f"{files[0]}: found none of its ids in {texts.files[0]}, wanted all of them")
        done: set[int] = set()
        for where, query, passage, grade in _judgements(files, BadRows(skip=True)):
            for key, texts in ((query, queries), (passage, corpus)):
                if texts.places[hash(key)] == MISSING:
                    bad.add(UserError(f"{where}: found the id {key!r}, wanted one of {texts.files[0]}"))
            grades = judged[hash(query)]
            if grade != grades[hash(passage)]:
                found = f"another score for query {query!r} and passage {passage!r} than before"
                bad.add(UserError(f"{where}: found {found}, wanted one"))
            elif grade > 0 and hash(query) not in done and queries.places[hash(query)] >= 0:
                relevant = [key for key, grade in grades.items() if grade > 0 and corpus.places[key] >= 0]
                if hash(passage) in relevant:
                    done.add(hash(query))
                    text, instruction = queries.get(hash(query))
                    yield RawExample(where, text, [corpus.get(key)[0] for key in relevant], [], instruction=instruction)
        asked = sum(place >= 0 for place in queries.places.values())
        notes["queries without a passage of a score above 0, left out"] += asked - len(done)


def _judgements(files: list[Path], bad: BadRows) -> Iterator[Judgement]:
    for file in files:
        yield from read_qrels(file, bad)
