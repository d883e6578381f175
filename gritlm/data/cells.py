"""What a cell of a table holds: a text, a list written as text, an empty cell's word, an id or an instruction."""

import ast
import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from gritlm.errors import UserError
from gritlm.models.text import titled

# How pandas, SQL and spreadsheets write an empty cell, in lower case.
NULL_WORDS = {
    *("nan", "null", "none", "n/a", "na", "<na>", "#n/a", "nat", "nil", "#ref!", "#value!", "#name?", "#div/0!", "\\n"),
    *("(null)", "[null]", "<null>", "(none)", "[none]", "<none>", "[nan]", "undefined", "[deleted]", "[removed]"),
    *("<noinput>", "no answer present."),
}
NULL_LENGTH = max(map(len, NULL_WORDS))
TEXT_KEYS = ("text", "passage_text", "page_content", "content", "contents", "passage", "document")  # by preference
LIST_START = {"[", "(", "{"}
LIST_AS_TEXT = re.compile(r"(array\()?[\[({]\s*(array\(|['\"\]]|[\[({]\s*['\"])")
NUMPY_REPR = re.compile(r"\barray\(\[|\bdtype=")
NUMPY_ARRAY = re.compile(r"(?<=[^\\,\[\s])(['\"])\s+['\"](?=[^\s,\]])")
NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?%?", re.IGNORECASE)
CODE = re.compile(r"[0-9a-f]{16,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|B0[0-9A-Z]{8}", re.IGNORECASE)
LONG_CODE = re.compile(r"(?=\S*[\d_])[!-~]{7,}")  # of one word: clueweb09-en0000-01-00001, PMC13900
ID_NAME = re.compile(r"(.*_)?(doc|[a-z])?_?ids?")


def is_null(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= NULL_LENGTH and (not value or value.strip().casefold() in NULL_WORDS)
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_list(value: object, name: str = "") -> list[Any]:
    """The items of a cell of the column `name`. A list or an object written as text (Python, JSON) is decoded.

    Raises:
        UserError: the text is such a list, and cannot be decoded.
    """
    if not isinstance(value, str):
        return value if isinstance(value, list) else [value]
    if not LIST_START.intersection(value[:9]) or not LIST_AS_TEXT.match(text := value.strip()):
        return [value]
    # Python joins two strings without a comma between them, and numpy prints arrays so.
    for decode in () if NUMPY_ARRAY.search(text) else (json.loads, ast.literal_eval):
        try:
            found = decode(text)
            if isinstance(found, set):  # its order is not that of the text
                break
            return [found] if isinstance(found, dict | str) else list(found)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    if NUMPY_REPR.search(text) or (text[0] == "[" and text[-1] == "]") or (text[:2] == '{"' and text[-2:] == '"}'):
        raise UserError(f"{name}: found {clip(text)}, a list written as text that is neither Python nor JSON")
    return [value]


def text_of(item: object, name: str, accept_numbers: bool) -> object:
    """A text as the training format has it: an object's title and text are joined, a number becomes its digits.

    Raises:
        UserError: an object has no text, or a number was not expected.
    """
    if isinstance(item, dict):
        if "role" in item:
            raise UserError(
                f"{name}: found a chat message (role {item['role']}), wanted a text; write the answer alone"
            )
        texts = [key for key in TEXT_KEYS if isinstance(item.get(key), str)]
        if not texts:
            raise UserError(f"{name}: found an object with {', '.join(map(str, item))}, wanted one with title and text")
        title, instruction = item.get("title"), item.get("instruction")
        if instruction and isinstance(instruction, str):
            return [instruction, item[texts[0]]]
        return titled({"title": title if isinstance(title, str) else None, "text": item[texts[0]]}, name)
    if isinstance(item, int | float) and not isinstance(item, bool):
        if not accept_numbers:
            raise UserError(f"{name}: found the number {item}, wanted a text (--accept_numbers takes numbers as texts)")
        return str(item)
    return item


# ---- looking at a column


def lists_in(values: Iterable[object]) -> Iterator[list[Any]]:
    """The items of each cell that can be decoded."""
    for value in values:
        with contextlib.suppress(UserError):
            yield as_list(value)


def texts_in(values: Iterable[object]) -> list[str]:
    """The strings and numbers of cells and of lists in cells."""
    items = (item for cell in lists_in(values) for item in cell)
    texts = [_text_in(item) if isinstance(item, dict) else item for item in items]
    return [
        str(text).strip()
        for text in texts
        if isinstance(text, str | int | float) and not isinstance(text, bool) and not is_null(text)
    ]


def _text_in(item: dict) -> object:
    return next((item[key] for key in TEXT_KEYS if key in item), None)


def looks_like_ids(name: str, texts: list[str], queries: list[str]) -> str:
    """What a column holds instead of texts: "numbers", "links", "ids" or "". `name` is in normal form."""
    if not texts:
        return ""
    if all(map(NUMBER.fullmatch, texts)):
        return "numbers"
    if all(text.startswith(("http://", "https://")) and len(text.split()) == 1 for text in texts):
        return "links"
    if all(map(CODE.fullmatch, texts)) or (ID_NAME.fullmatch(name) and not any(" " in text for text in texts)):
        return "ids"
    if not queries or any(len(query.split()) < 3 for query in queries):
        return ""
    # Answers to sentences: d17, d3 (one prefix and a number), or long words with digits.
    numbered = [re.fullmatch(r"([^\d\s]*?)[-_:]?\d+([#_:.-]\d+)*", text) for text in texts]
    same = len({match and match[1] for match in numbered}) == 1 and all(numbered)
    return "ids" if same or all(map(LONG_CODE.fullmatch, texts)) else ""


def pairs_in(values: Iterable[object]) -> str:
    """What the lists of two texts of a column are.

    Returns:
        "flat": each is [instruction, text]. "same": all begin with one text, which may be an instruction. "mixed": some
        are [instruction, text]. "": none seems to be.
    """
    given = [cell for cell in lists_in(values) if cell not in ([None], [], [""])]
    starts = [cell[0] for cell in given if is_pair(cell)]
    marked = Counter(filter(is_instruction, starts))
    if starts and marked.total() == len(given):
        alone = len(given) == 1 and starts[0][-1].isspace()
        return "flat" if alone or len(marked) <= len(given) / 2 else "mixed"
    if sum(count for count in marked.values() if count > 1) > len(given) / 2:
        return "mixed"  # an instruction that rows share, and rows without one
    if not given or len(starts) < len(given):
        return ""
    return "same" if len(starts) > 2 and len({*starts}) <= len(starts) / 3 else ""


def is_instruction(text: str) -> bool:
    """Whether the first of two texts could be an instruction for the second."""
    return text.endswith((" ", "\n", "\t", ":", ";")) or text.startswith("Represent ")


def is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def clip(value: object, length: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."
