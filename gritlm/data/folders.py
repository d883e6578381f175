"""The files of a data set: one file, or those in a folder and in the folders below it. Test splits are left out."""

import os
import re
from collections import Counter
from pathlib import Path

from gritlm.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.zst", ".jsonl.xz", ".parquet")  # in any letter case
NO_FILE = "found a pipe, socket or device, wanted a file or a folder"
SHOWN = 20  # files left out that a line names
# train-00000-of-00002, on the hub also with a hash behind it
SHARD = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})(-[0-9a-f]{16})?")
# Words for data to test on, anywhere in a path: alone (nq-test2, testset) or in camel case (nqTest; not DevOps).
TEST_SPLIT = re.compile(
    r"((?<![^\W\d_])|(?<=[a-z])(?=[A-Z]))"
    r"(?i:(tests?|testing|tst|dev|val|valid|validate|validation|evals?|evaluation)(sets?|data|splits?)?"
    r"|(held|hold)[-_ ]?outs?(set|data)?|benchmarks?)"
    r"((?![^\W\d_])|(?<=[a-z])(?<![Dd]ev)(?=[A-Z][a-z]))"
)


def is_data(path: Path) -> bool:
    """Whether a file's name ends as that of a data file."""
    return path.name.lower().endswith(SUFFIXES)


def stem(path: Path) -> str:
    """A file's name without its suffix; a folder's whole name."""
    lower = path.name.lower()
    return next((path.name[: -len(suffix)] for suffix in SUFFIXES if lower.endswith(suffix)), path.name)


def set_name(entry: Path) -> str:
    """The name of the data set of a file or folder in a data folder. The shards of a set have one name."""
    shard = SHARD.fullmatch(stem(entry))
    return shard["name"] if shard else stem(entry)


def is_test_split(path: Path) -> bool:
    """Whether a file's path within a data folder has a word for data to test on."""
    return bool(TEST_SPLIT.search(path.with_name(stem(path)).as_posix()))


def find_files(train_data: str | Path) -> dict[str, list[Path]]:
    """The files of each data set by the set's name, sorted. A file is one set.

    In a folder each sub-folder, each file, and the shards of one name are one set. Links to files and folders are
    followed. Hidden files, files with other suffixes, and test splits are left out.

    Raises:
        UserError: there is nothing to train on, two sets have one name, or something there cannot be read.
    """
    root = Path(train_data)
    if root.is_file():
        return {stem(root): [root]}
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: {NO_FILE}")
    train, tests, others = _files_by_use(root)
    if tests and not train:
        raise UserError(f"{root}: found test splits alone: {_listed(tests, root)}; name a file itself to train on it")
    if not train:
        holds = f" (it holds {_listed(others, root)}; see gritlm prepare)" if others else ""
        raise UserError(f"{root}: found a folder without data{holds}, wanted files that end in {', '.join(SUFFIXES)}")
    found: dict[tuple[str, str], list[Path]] = {}  # (set, entry without a shard's number) -> files
    for file in train:
        entry = root / file.relative_to(root).parts[0]
        found.setdefault((set_name(entry), SHARD.sub(r"\g<name> \g<count>", entry.name)), []).append(file)
    sets: dict[str, list[Path]] = {}
    for (name, _), files in sorted(found.items()):
        if name in sets:
            raise UserError(f"{files[0]}: found a second data set {name!r} in {root}, wanted one of a name")
        sets[name] = sorted(files)
        _check_once(sets[name])
    return sets


def _files_by_use(root: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The files of a folder to train on, its test splits, and those with other endings."""
    train: list[Path] = []
    tests: list[Path] = []
    others: list[Path] = []
    for file in list_files(root):
        (others if not is_data(file) else tests if is_test_split(file.relative_to(root)) else train).append(file)
    return train, tests, others


def _check_once(files: list[Path]) -> None:
    """Refuse a file of a data set whose rows another one of its files holds too."""
    real, stems, shards = (dict[Path, Path]() for _ in range(3))  # what must differ -> the first file that has it
    for file in files:
        if (other := real.setdefault(file.resolve(), file)) != file:
            raise UserError(f"{file}: found a link to {other} of the same data set, wanted its rows once")
        if (other := stems.setdefault(file.with_name(stem(file)), file)) != file:
            raise UserError(f"{file}: found {other.name} beside it, wanted the rows of {stem(file)} once")
        if shard := SHARD.fullmatch(stem(file)):
            other = shards.setdefault(file.with_name(shard["name"]), file)
            if f"-of-{shard['count']}" not in other.name:
                raise UserError(f"{file}: found {other.name} beside it, wanted shards of one number of files")


def describe_folder(train_data: str | Path) -> list[str]:
    """Lines on the linked folders of a data folder, on its files that are left out, and on missing shards."""
    root = Path(train_data)
    if not root.is_dir():
        return _missing_shards([root], root.parent)
    train, tests, others = _files_by_use(root)
    parents = {folder for file in (*train, *tests, *others) for folder in file.parents if root in folder.parents}
    links = [f"{folder} -> {folder.resolve()}" for folder in sorted(parents) if folder.is_symlink()]
    lines = [f"  linked: {', '.join(links)}"] if links else []
    if tests:
        lines.append(f"  test splits left out (name a file itself to train on it): {_listed(tests, root)}")
    if others:
        lines.append(f"  files left out because of their endings: {_listed(others, root)}")
    return lines + _missing_shards(train, root)


def _listed(files: list[Path], root: Path) -> str:
    names = [str(file.relative_to(root)) for file in files]
    return ", ".join(names[:SHOWN] + ([f"and {len(names) - SHOWN} more"] if names[SHOWN:] else []))


def _missing_shards(files: list[Path], root: Path) -> list[str]:
    matches = [(file, shard) for file in files if (shard := SHARD.fullmatch(stem(file)))]
    shards = Counter((file.relative_to(root).with_name(shard["name"]), int(shard["count"])) for file, shard in matches)
    return [f"  {name}: found {found} of {count} shards" for (name, count), found in shards.items() if found < count]


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
