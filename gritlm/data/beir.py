"""Read BEIR folders: queries, corpus and relevance judgements, as files or as folders of shards (MTEB, NanoBEIR).

Of the corpus only the judged passages are kept, in a temporary file.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import IO

from gritlm.data.cells import is_null
from gritlm.data.containers import FileError, file_errors
from gritlm.data.qrels import PASSAGE_IDS, SHARD, Judgement, clean_id, read_qrels, stem_of
from gritlm.data.raw import BadRows, RawExample
from gritlm.data.tables import TABLES, ending, objects, read_rows
from gritlm.errors import UserError
from gritlm.models.text import titled

WANTED = "wanted corpus.jsonl, queries.jsonl and qrels/, each once"
IDS = {"queries": ("_id", "id", "query_id", "query-id", "qid"), "corpus": ("_id", "id", *PASSAGE_IDS)}
MISSING, BLANK = -1, -2  # in place of where a text begins


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
        tables = (path for path in _entries(folder) if path.is_file() and ending(path) in TABLES)
        files = [path for path in tables if stem_of(path) == kind]
        parts[kind] = _by_stem(files or _entries(folder / kind))
        sharded &= bool(parts[kind]) and not files
    names = ["qrels", "data", "default"] if sharded else ["qrels"]  # MTEB has several names for it
    return parts | {"qrels": next(filter(None, (_by_stem(_entries(folder / name)) for name in names)), {})}


def _entries(folder: Path) -> list[Path]:
    with file_errors(folder):
        return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def _by_stem(paths: list[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    stems: dict[str, Path] = {}
    for file in paths:
        if file.is_file() and ending(file) in TABLES:
            if (other := stems.setdefault(stem_of(file), file)) != file:
                raise FileError(f"{file.parent}: found {other.name} and {file.name}, {WANTED}")
            found.setdefault(SHARD.sub("", stem_of(file)), []).append(file)
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
            yield where, clean_id(row[name]), row


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
