"""Find the queries of evaluation sets in training data, exactly or nearly equal."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from gritlm.data.beir import read_qrels
from gritlm.data.raw import BadRows
from gritlm.data.rows import decode, read_blocks, text_id
from gritlm.errors import UserError

SHINGLE = 8  # consecutive words
SHARE = 0.8  # of the shorter text's shingles: nearly equal texts have this many in common


class _Letters(dict):
    """For `str.translate`: keeps letters, digits and combining marks; everything else becomes a space."""

    def __missing__(self, code: int) -> int:
        letter = chr(code)
        self[code] = code if letter.isalnum() or unicodedata.category(letter)[0] == "M" else ord(" ")
        return self[code]


_LETTERS = _Letters()


def normal_words(text: str) -> list[str]:
    """The words of a text in lower case and NFKC form, without punctuation."""
    return unicodedata.normalize("NFKC", text.casefold()).translate(_LETTERS).split()


class EvaluationTexts:
    """The texts of evaluation sets, to look up other texts in.

    A match is "exact" when two texts are equal up to trailing white space. It is "near" when they have the same words
    in the same order, or have 80% of the shorter one's shingles of 8 words in common.
    """

    def __init__(self, texts: Iterable[str]):
        self.exact: set[int] = set()
        self.normal: set[int] = set()  # hashes of the texts' words
        self.shingles: dict[int, list[int]] = {}  # shingle -> numbers of the texts that have it
        self.sizes: list[int] = []  # shingles of each text
        for text in texts:
            if text_id(text) in self.exact:
                continue
            self.exact.add(text_id(text))
            words = normal_words(text)
            self.normal.add(hash(tuple(words)))
            shingles = _shingles(words)
            for shingle in shingles:
                self.shingles.setdefault(shingle, []).append(len(self.sizes))
            self.sizes.append(len(shingles))

    def find(self, text: str) -> str:
        """Look a text up: "exact", "near" or ""."""
        if text_id(text) in self.exact:
            return "exact"
        words = normal_words(text)
        if words and hash(tuple(words)) in self.normal:
            return "near"
        shingles = _shingles(words)
        shared = Counter(number for shingle in shingles for number in self.shingles.get(shingle, ()))
        near = any(count >= SHARE * min(len(shingles), self.sizes[number]) for number, count in shared.items())
        return "near" if near else ""


def _shingles(words: list[str]) -> set[int]:
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}


def read_evaluation_queries(path: Path) -> list[str]:
    """Read the queries of a BEIR folder (the split test, if it has one), or the queries or texts of a file.

    Raises:
        UserError: the path is neither.
    """
    if path.is_dir():
        queries, qrels = path / "queries.jsonl", path / "qrels" / "test.tsv"
        if not queries.is_file():
            raise UserError(f"{path}: found no queries.jsonl in it, wanted a BEIR folder or a file")
        wanted = {query for _, query, _, _ in read_qrels(qrels, BadRows())} if qrels.is_file() else None
        found = [text for key, text in _texts(queries) if wanted is None or key in wanted]
        if not found:
            raise UserError(f"{qrels}: found no id of {queries} in it, wanted query-id, corpus-id and score a line")
        return found
    return [text for _, text in _texts(path)]


def _texts(path: Path) -> Iterable[tuple[str, str]]:
    for block in read_blocks(path, columns=("_id", "text", "query")):
        for number, raw in block:
            row = decode(path, number, raw)
            key, text = "", row
            if isinstance(row, dict):
                key, text = str(row.get("_id", "")), row.get("text", row.get("query"))
            if isinstance(text, list) and len(text) == 2:  # [instruction, text]
                text = text[1]
            if not isinstance(text, str):
                found = json.dumps(row, ensure_ascii=False, default=str)[:60]
                raise UserError(f'{path}:{number}: found {found}, wanted a string, or an object with "text" or "query"')
            yield key, text
