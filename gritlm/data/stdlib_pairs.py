"""Pairs of a docstring's summary and its source code, collected from the Python of this machine."""

import ast
import hashlib
import sysconfig
import textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HELD_OUT = 950  # pairs at most
MAX_PAIRS = 40_000  # from installed packages; the standard library is used in full
Pair = tuple[str, str]  # summary, source without its docstring


def extract_pairs(path: Path) -> list[Pair]:
    """The documented functions and classes of a file: first paragraph of the docstring, source without docstrings."""
    try:
        source = path.read_text(encoding="utf-8")
        body = ast.parse(source).body if '"""' in source else []
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []  # a template, or the syntax of another Python version
    documented = []
    docstring_lines: set[int] = set()
    while body:
        node = body.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        body += node.body
        if docstring := ast.get_docstring(node):
            documented.append((node, " ".join(docstring.split("\n\n")[0].split())))
            docstring_lines.update(_lines_of(node.body[0]))
    lines = source.splitlines()
    pairs = []
    for node, summary in documented:
        kept = [lines[i - 1] for i in _lines_of(node) if i not in docstring_lines]
        if len(node.body) > 1 and len(summary) >= 12 and summary.count(" ") >= 2:
            pairs.append((summary[:500], textwrap.dedent("\n".join(kept))[:4000].rstrip()))
    return pairs


def _lines_of(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _files(root: Path, skip: tuple[str, ...]) -> list[Path]:
    return sorted(p for p in root.rglob("*.py") if not set(skip) & set(p.relative_to(root).parts))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _distinct(pairs: list[Pair], seen: set[str]) -> list[Pair]:
    """The pairs without those whose summary or code is in `seen`; adds the others to `seen`."""
    kept = []
    for summary, code in pairs:
        if summary not in seen and code not in seen:
            seen.update((summary, code))
            kept.append((summary, code))
    return kept


def collect(max_pairs: int) -> tuple[list[Pair], list[Pair]]:
    """Collect (train, held out) pairs, at most `max_pairs` of them from installed packages.

    Whole modules of the standard library are held out, and none of their texts is trained.
    """
    paths = sysconfig.get_paths()
    library = Path(paths["stdlib"])
    standard = _files(library, ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"))
    # In the order of a hash, so that a cap takes files from all packages.
    installed = _files(Path(paths["purelib"]), ("tests", "test", "__pycache__"))
    installed.sort(key=lambda path: _digest("/".join(path.parts[-2:])))

    with ProcessPoolExecutor() as pool:
        by_module: dict[str, list[Pair]] = {}
        for path, pairs in zip(standard, pool.map(extract_pairs, standard, chunksize=16), strict=True):
            by_module.setdefault(path.relative_to(library).parts[0].removesuffix(".py"), []).extend(pairs)
        seen: set[str] = set()
        train: list[Pair] = []
        held: list[Pair] = []
        for module in sorted(by_module, key=_digest):
            pairs = _distinct(by_module[module], seen)
            target = held if len(held) + len(pairs) <= HELD_OUT else train
            target += pairs
        more: list[Pair] = []
        for start in range(0, len(installed), 512):
            for pairs in pool.map(extract_pairs, installed[start : start + 512], chunksize=16):
                more += _distinct(pairs, seen)
            if len(more) >= max_pairs:
                break
    return train + more[:max_pairs], held
