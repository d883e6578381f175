"""Read BEIR folders: corpus, queries and relevance judgements."""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from gritlm.data.raw import BadRows, RawExample
from gritlm.data.tables import ENDINGS, read_rows
from gritlm.errors import UserError


def read_beir(folder: Path, split: str, bad: BadRows) -> Iterator[RawExample]:
    """Read a split of a BEIR folder: one example per query, its positives all passages with a relevance above 0.

    Raises:
        UserError: there is no such split, or a row is bad and bad rows are not skipped.
    """
    qrels = folder / "qrels" / f"{split}.tsv"
    if not qrels.is_file():
        found = ", ".join(sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))) or "none"
        raise UserError(f"{qrels}: no such file; found the splits {found} (--split)")
    texts = {kind: {key: row for _, key, row in read_by_id(folder, kind, bad)} for kind in ("queries", "corpus")}
    relevant: dict[str, list[str]] = {}
    where: dict[str, str] = {}
    for number, query, passage, score in read_qrels(qrels, bad):
        missing = [(key, kind) for key, kind in ((query, "queries"), (passage, "corpus")) if key not in texts[kind]]
        for key, kind in missing:
            bad.add(UserError(f"{qrels}:{number}: found the id {key!r}, wanted one of {folder / kind}.jsonl"))
        if score > 0 and not missing:
            relevant.setdefault(query, []).append(passage)
            where.setdefault(query, f"{qrels}:{number}")
    for query, passages in relevant.items():
        positives = [_passage(texts["corpus"][passage]) for passage in passages]
        yield RawExample(where[query], texts["queries"][query].get("text"), positives, [])


def read_by_id(folder: Path, kind: str, bad: BadRows) -> Iterator[tuple[str, str, dict]]:
    """Yield file:line, id and row of the queries or of the corpus of a BEIR folder.

    Raises:
        UserError: there is no such file or more than one, or a row is bad and bad rows are not skipped.
    """
    files = [path for path in sorted(folder.glob(f"{kind}.*")) if path.name.endswith(ENDINGS)]
    if len(files) != 1:
        found = " and ".join(path.name for path in files) or f"no {kind}.jsonl"
        raise UserError(f"{folder}: found {found}, wanted corpus.jsonl, queries.jsonl and qrels/, each once")
    seen = set()
    for where, row in read_rows(files[0], bad):
        given = row.get("_id", row.get("id"))
        key = str(given)
        if given in (None, ""):
            bad.add(UserError(f"{where}: found the keys {', '.join(row)}, wanted _id and text"))
        elif key in seen:
            bad.add(UserError(f"{where}: found the _id {key!r} a second time, wanted it once"))
        else:
            seen.add(key)
            yield where, key, row


def _passage(row: dict) -> object:
    title, text = row.get("title"), row.get("text")
    return f"{title} {text}" if title and isinstance(text, str) else text  # like models.text.titled, but unchecked


def read_qrels(path: Path, bad: BadRows) -> Iterator[tuple[int, str, str, float]]:
    """Yield line number, query id, passage id and relevance of each line of a qrels file, gzip too.

    It has BEIR's three columns, with any header or none, or TREC's four.

    Raises:
        UserError: the file is not UTF-8, or a line is bad and bad rows are not skipped.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: found {error}, wanted tab-separated UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        parts = line.split("\t")
        if len(parts) == 1 and len(trec := line.split()) == 4:
            parts = trec
        if len(parts) == 4:
            parts = [parts[0], *parts[2:]]
        if not line.strip() or (number == 1 and len(parts) == 3 and not re.search(r"\d", line)):
            continue
        try:
            query, passage, score = parts
            found = number, query, passage, float(score)
        except ValueError:
            wanted = "wanted query-id, corpus-id and score, with tabs between them"
            bad.add(UserError(f"{path}:{number}: found {line[:60]!r}, {wanted}"))
            continue
        yield found
