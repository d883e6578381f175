"""Texts of others in Markdown: escaped, in one line, in tables."""

import json
import re
from collections.abc import Iterable, Sequence


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def code(text: object) -> str:
    """A text as it is, also in a cell of a table."""
    text = " ".join(str(text).splitlines()).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{text}{ticks}" if len(ticks) == 1 else f"{ticks} {text} {ticks}"


def value_code(value: object) -> str:
    return code(json.dumps(value, ensure_ascii=False))


def plain(text: object) -> str:
    """A text of others, without what Markdown or HTML would read in it."""
    return re.sub(r"([\\`*\[<|])", r"\\\1", one_line(text))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "---|" * len(header)
    return ["| " + " | ".join(header) + " |", rule, *lines] if lines else []
