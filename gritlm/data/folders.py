"""The files of a data set: one file, or those in a folder and in the folders below it."""

import os
from collections import Counter
from pathlib import Path

from gritlm.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
NO_FILE = "found a pipe, socket or device, wanted a file or a folder"


def stem(path: Path) -> str:
    """A file's name without its suffix; a folder's whole name."""
    return next((path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix)), path.name)


def find_files(train_data: str | Path) -> dict[str, list[Path]]:
    """The files of each data set by the set's name, sorted. A file is one set; in a folder each entry is one set.

    Links to files and folders are followed. Hidden files, and files with other suffixes, are left out.

    Raises:
        UserError: there is nothing to read, two sets have one name, or something there cannot be read.
    """
    root = Path(train_data)
    if root.is_file():
        return {stem(root): [root]}
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: {NO_FILE}")
    found: dict[str, list[Path]] = {}
    for file in list_files(root):
        if file.name.endswith(SUFFIXES):
            found.setdefault(file.relative_to(root).parts[0], []).append(file)
    if not found:
        raise UserError(f"{root}: found a folder without data, wanted files that end in {', '.join(SUFFIXES)}")
    sets: dict[str, list[Path]] = {}
    for entry, files in sorted(found.items()):
        if stem(root / entry) in sets:
            raise UserError(
                f"{root / entry}: found a second data set {stem(root / entry)!r} in {root}, wanted one of a name"
            )
        first: dict[Path, Path] = {}
        for file in sorted(files):
            if (other := first.setdefault(file.resolve(), file)) != file:
                raise UserError(f"{file}: found a link to {other} of the same data set, wanted its rows once")
        sets[stem(root / entry)] = sorted(files)
    return sets


def describe_folder(train_data: str | Path) -> list[str]:
    """A line for the linked folders of a data folder, and one for the files in it that are left out."""
    root = Path(train_data)
    files = list_files(root) if root.is_dir() else []
    links = sorted(
        {folder for file in files for folder in file.parents if root in folder.parents and folder.is_symlink()}
    )
    others = Counter(file.suffix or file.name for file in files if not file.name.endswith(SUFFIXES))
    lines = [f"  linked: {', '.join(f'{link} -> {link.resolve()}' for link in links)}"] if links else []
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        lines.append(f"  files left out because of their endings: {counts}")
    return lines


def list_files(root: Path) -> list[Path]:
    """All files in a folder and in the folders below it, linked ones too, without hidden ones.

    Raises:
        UserError: naming a folder that cannot be read or links to one that holds it, or what is no file.
    """
    files: list[Path] = []

    def walk(folder: Path, within: tuple[Path, ...]) -> None:
        real = folder.resolve()
        if real in within:
            raise UserError(f"{folder}: found a link to a folder that holds it ({real}), wanted none")
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                walk(entry, (*within, real))
            elif entry.is_file():
                files.append(entry)
            else:
                entry.stat()  # raises the reason: a link to nothing, a loop of links, no permission
                raise UserError(f"{entry}: {NO_FILE}")

    try:
        walk(root, ())
    except (OSError, RuntimeError) as error:
        place = getattr(error, "filename", None) or root
        link = " (a link to nothing)" if isinstance(error, FileNotFoundError) and os.path.islink(place) else ""
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{place}: cannot be read: {why}{link}") from error
    return files
