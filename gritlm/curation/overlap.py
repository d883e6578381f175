"""Find the queries and relevant documents of evaluation sets in training data, exactly or nearly equal."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gritlm.curation.near_copies import NearCopies
from gritlm.data.beir import BeirFolder, find_beir, read_by_id
from gritlm.data.cells import TEXT_KEYS, as_list, clip, is_pair, text_of
from gritlm.data.folders import is_test_split
from gritlm.data.labels import SCORES, normal
from gritlm.data.qrels import read_qrels
from gritlm.data.raw import BadRows
from gritlm.data.roles import ANSWER, PARTNER, PASSAGE, QUERY
from gritlm.data.tables import read_rows
from gritlm.errors import UserError
from gritlm.models.text import titled

LATER = ("title", "instruction", "prompt")  # the query only where nothing else is
QUERIES = (*(name for name in QUERY if name not in LATER), *TEXT_KEYS, "sentence", "sentence_a", *LATER)
SECOND = PARTNER | {"sentence_a": "sentence_b"}  # two texts whose similarity is known: both are queries
POSITIVE = re.compile(r"(pos|positive|gold|relevant|correct)s?(_(?!ids?$)[a-z]+)?\d*")  # all of them are documents
DOCUMENTS = (*PASSAGE, *ANSWER)  # the first of them, where no name says positive
KINDS = ("", "similar", "near", "exact")
SPLITS = ("test", "dev", "validation", "val")


class _Texts(NamedTuple):
    """The texts of an evaluation set, and what was read of it."""

    queries: list[str]
    documents: list[str]
    read: str


class Leak(NamedTuple):
    """A row of training data that holds a text of an evaluation set."""

    row: int  # its number among the rows that were looked up
    what: str  # "query"; "document": a positive is a relevant document; "query as positive": a positive is a query
    kind: str  # "exact", "near" or "similar"


class EvaluationTexts:
    """The queries of evaluation sets and their relevant documents, to look up training data in."""

    def __init__(self, queries: Iterable[str], documents: Iterable[str] = (), read: Iterable[str] = ()):
        queries, documents = [*queries], [*documents]
        self.queries, self._documents = len(queries), len(documents)
        self.read_from = [*read]  # a line on each evaluation set
        self._queries, self._all = NearCopies(queries), NearCopies([*documents, *queries])

    @classmethod
    def read(cls, paths: Sequence[Path]) -> "EvaluationTexts":
        """Read BEIR folders (their test split), qrels files in them, and files of queries or pairs.

        Raises:
            UserError: a path is neither, or a row of it is bad.
        """
        found = [_read_folder(path) if path.is_dir() or _is_qrels(path) else _read_file(path) for path in paths]
        queries, documents = ([text for part in found for text in part[side]] for side in (0, 1))
        return cls(queries, documents, (_line(path, *part) for path, part in zip(paths, found, strict=True)))

    def find_leaks(self, rows: Sequence[dict]) -> Iterator[Leak]:
        """Look up rows, as `parse_row` gives them: at most one leak of each `what` a row, that of the best match."""
        for number, match in enumerate(self._queries.find_all([row["query"]["text"] for row in rows])):
            if match.kind:
                yield Leak(number, "query", match.kind)
        owners = [number for number, row in enumerate(rows) for _ in row["pos"]["text"]]
        best: dict[tuple[int, str], str] = {}
        matches = self._all.find_all([text for row in rows for text in row["pos"]["text"]])
        for number, match in zip(owners, matches, strict=True):
            if match.kind:
                key = number, "document" if match.number < self._documents else "query as positive"
                best[key] = max(best.get(key, ""), match.kind, key=KINDS.index)
        yield from (Leak(*key, kind) for key, kind in best.items())


# ---- reading evaluation sets: their queries, and the documents that are relevant to them


def _line(path: Path, queries: list[str], documents: list[str], read: str) -> str:
    return f"{path}: {len(queries)} queries, {len(documents)} texts of relevant documents{read}"


def _split(names: Iterable[str]) -> str | None:
    """The split to read: a usual name of a test split, else one with a word for it, else another; train last."""

    def place(name: str) -> tuple[int, bool, bool]:
        lower = name.casefold()
        usual = SPLITS.index(lower) if lower in SPLITS else len(SPLITS)
        return usual, not is_test_split(Path(name)), "train" in lower

    return min(names, key=place, default=None)


def _is_qrels(path: Path) -> bool:
    return path.parent.name == "qrels" and path.is_file()


def _read_folder(path: Path) -> _Texts:
    root = path.parent.parent if _is_qrels(path) else path
    lone = [] if [*root.glob("corpus*")] else [*root.glob("queries.jsonl")]  # without a corpus
    splits = {file.stem: [file] for file in root.glob("qrels/*.tsv")} if lone else {}
    folder = BeirFolder(root, lone, [], splits) if lone else find_beir(root)
    if folder is None:
        raise UserError(f"{path}: found no queries and qrels in it, wanted a BEIR folder or a file")
    split = _split(folder.qrels)
    qrels = [path] if _is_qrels(path) else folder.qrels[split] if split else []
    judged = [judgement for file in qrels for judgement in read_qrels(file, BadRows())]
    wanted = {query for _, query, _, _ in judged}
    relevant = {passage for _, _, passage, grade in judged if grade > 0}
    rows = read_by_id(folder.queries, "queries", BadRows())
    queries = [titled(row | {"title": None}, where) for where, key, row in rows if not qrels or key in wanted]
    if not queries:
        found = f"found no id of {folder.queries[0]} in it"
        raise UserError(f"{qrels[0]}: {found}, wanted query-id, corpus-id and score a line")
    documents: list[str] = []
    for where, key, row in read_by_id(folder.corpus, "corpus", BadRows()):
        if key in relevant:
            whole = titled(row, where)
            documents += dict.fromkeys((whole, row["text"] or whole))  # training data has it with its title or without
    others = ", ".join(name for name in folder.qrels if name != split)
    read = f"; split {split}" + f" (not read: {others})" * bool(others) if split and not _is_qrels(path) else ""
    return _Texts(queries, documents, read)


def _cells(row: object) -> dict[str, object]:
    """A row by the normal names of its columns. An array is [instruction, text] or [query, positive, negative]."""
    if isinstance(row, dict):
        return {normal(name): value for name, value in row.items()}
    is_array = isinstance(row, list) and len(row) in (2, 3) and all(isinstance(item, str) for item in row)
    if not isinstance(row, list) or not is_array or _has_instruction(row):
        return {"query": row}
    return {"query": row[0], "positive": row[1]}


def _has_instruction(row: list) -> bool:
    return is_pair(row) and row[0].endswith((" ", "\n", "\t", ":", ";"))


def _read_file(path: Path) -> _Texts:
    queries: list[str] = []
    documents: list[str] = []
    unread: dict[str, None] = {}
    rows = [*read_rows(path, BadRows())]
    if len(rows) == 1 and isinstance(only := rows[0][1], list) and not _has_instruction(only):  # an array of queries
        rows = [(rows[0][0], item) for item in only]
    for where, row in rows:
        cells = _cells(row)
        usual = [name for name in QUERIES if cells.get(name) is not None]
        if not usual:
            raise UserError(f"{where}: found {clip(row)}, wanted a string, or an object with query or text")
        names = [usual[0], SECOND.get(usual[0], usual[0])]
        queries += [_text(cells.pop(name), where) for name in dict.fromkeys(names) if cells.get(name) is not None]
        if usual[0] not in TEXT_KEYS:
            texts = [name for name, cell in cells.items() if isinstance(cell, str | list | dict)]
            named = [name for name in texts if POSITIVE.fullmatch(name) and not SCORES.fullmatch(name)]
            for name in named or [name for name in DOCUMENTS if name in texts][:1]:
                cell = cells.pop(name)
                cell = cell["text"] if isinstance(cell, dict) and isinstance(cell.get("text"), list) else cell  # SQuAD
                documents += [_text(item, where) for item in as_list(cell, where)]
        unread |= dict.fromkeys(cells)
    return _Texts(queries, documents, f"; not compared: {', '.join(unread)}" if unread else "")


def _text(item: object, where: str) -> str:
    """The text of a cell, without its instruction."""
    item = text_of(item, where, accept_numbers=False) if isinstance(item, dict) else item
    return titled(item[1] if isinstance(item, list) and is_pair(item) else item, where)
