"""Find the queries and relevant documents of evaluation sets in training data, exactly or nearly equal."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gritlm.curation.near_copies import NearCopies
from gritlm.data.beir import BeirFolder, find_beir, read_by_id, read_qrels
from gritlm.data.cells import TEXT_KEYS, as_list, clip, is_pair, text_of
from gritlm.data.raw import BadRows
from gritlm.data.roles import PARTNER, PASSAGE, QUERY
from gritlm.data.tables import read_rows
from gritlm.errors import UserError
from gritlm.models.text import titled

LATER = ("title", "instruction", "prompt")  # the query only where nothing else is
QUERIES = (*(name for name in QUERY if name not in LATER), *TEXT_KEYS, "sentence", "sentence_a", *LATER)
PAIRS = PARTNER | {"sentence_a": "sentence_b"}  # two texts whose similarity is known: both are queries
POSITIVES = ("positive", "pos", "positives", *PASSAGE)
KINDS = ("", "similar", "near", "exact")
SPLITS = ("test", "dev", "validation", "val")


class Leak(NamedTuple):
    """A row of training data that holds a text of an evaluation set."""

    row: int  # its number among the rows that were looked up
    what: str  # "query"; "document": a positive is a relevant document; "query as positive": a positive is a query
    kind: str  # "exact", "near" or "similar"


class EvaluationTexts:
    """The queries of evaluation sets and their relevant documents, to look up training data in."""

    def __init__(self, queries: Iterable[str], documents: Iterable[str] = ()):
        queries, documents = [*queries], [*documents]
        self._documents = len(documents)
        self._queries, self._all = NearCopies(queries), NearCopies([*documents, *queries])

    @classmethod
    def read(cls, paths: Iterable[Path]) -> "EvaluationTexts":
        """Read BEIR folders (their split test, or dev), qrels files in them, and files of queries or pairs.

        Raises:
            UserError: a path is neither, or a row of it is bad.
        """
        found = [_read_folder(path) if path.is_dir() or _is_qrels(path) else _read_file(path) for path in paths]
        return cls(*([text for part in found for text in part[side]] for side in (0, 1)))

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


def _is_qrels(path: Path) -> bool:
    return path.parent.name == "qrels" and path.is_file()


def _read_folder(path: Path) -> tuple[list[str], list[str]]:
    root = path.parent.parent if _is_qrels(path) else path
    queries = root / "queries.jsonl"
    lone = queries.is_file() and not [*root.glob("corpus*")]
    folder = BeirFolder(root, [queries], [], {f.stem: [f] for f in root.glob("qrels/*.tsv")}) if lone else find_beir(root)
    if folder is None:
        raise UserError(f"{path}: found no queries and qrels in it, wanted a BEIR folder or a file")
    split = next((name for name in (*SPLITS, *folder.qrels) if name in folder.qrels), None)
    qrels = [path] if _is_qrels(path) else folder.qrels[split] if split else []
    judged = [judgement for file in qrels for judgement in read_qrels(file, BadRows())]
    wanted = {query for _, query, _, _ in judged}
    relevant = {passage for _, _, passage, grade in judged if grade > 0}
    texts = [titled(row | {"title": None}, at) for at, key, row in read_by_id(folder.queries, "queries", BadRows()) if not qrels or key in wanted]
    if not texts:
        raise UserError(f"{qrels[0]}: found no id of {folder.queries[0]} in it, wanted query-id, corpus-id and score a line")
    documents: list[str] = []
    for where, key, row in read_by_id(folder.corpus, "corpus", BadRows()):
        if key in relevant:
            whole = titled(row, where)
            documents += dict.fromkeys((whole, row["text"] or whole))  # training data has it with its title or without
    return texts, documents


def _read_file(path: Path) -> tuple[list[str], list[str]]:
    queries: list[str] = []
    documents: list[str] = []
    for where, row in read_rows(path, BadRows()):
        cells = {name.casefold(): value for name, value in row.items()} if isinstance(row, dict) else {"query": row}
        query = next((name for name in QUERIES if cells.get(name) is not None), None)
        if query is None:
            raise UserError(f"{where}: found {clip(row)}, wanted a string, or an object with query or text")
        queries += [_text(cells.pop(name), where) for name in (query, PAIRS.get(query)) if cells.get(name) is not None]
        if query not in TEXT_KEYS:
            cell = next((cells[name] for name in POSITIVES if cells.get(name) is not None), [])
            documents += [_text(item, where) for item in as_list(cell)]
    return queries, documents


def _text(item: object, where: str) -> str:
    """The text of a cell, without its instruction."""
    try:
        text = item[1] if is_pair(item) else text_of(item, accept_numbers=True)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return titled(text, where)
