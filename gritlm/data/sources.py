"""One door to public data: a file, a folder or a data set of the hub, told apart, with the flags that it takes."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gritlm.data.beir import find_beir, read_beir
from gritlm.data.columns import examples_of
from gritlm.data.containers import FileError
from gritlm.data.folders import is_test_split, list_files
from gritlm.data.raw import BadRows, Columns, RawExample, Reading
from gritlm.data.tables import SEPARATED, TABLES, ending, read_rows
from gritlm.errors import UserError, one_line

COLUMN_FLAGS = {
    *("query_column", "positive_column", "negative_columns", "label_column", "positive_above", "positive_labels"),
    *("score_column", "ignore_columns", "accept_numbers"),
}
SOURCE_FLAGS = COLUMN_FLAGS | {"split", "config", "no_header"}
NAMED = 5  # files that a note names
Rows = Iterator[tuple[str, object]]  # file:line and row


@dataclass
class Source:
    """Where examples come from. They are read when they are asked for, once."""

    used: set[str]  # the flags that have an effect on this kind of input
    reading: Reading
    examples: Iterator[RawExample]


def open_source(
    name: str,
    columns: Columns,
    bad: BadRows,
    split: str | None = None,
    config: str | None = None,
    no_header: bool = False,
) -> Source:
    """Tell what kind of input a name is: hub:NAME, a file, a BEIR folder, or a folder of splits.

    Args:
        columns: which columns to read; a BEIR folder leaves no choice.
        bad: collects or raises the errors of bad rows.
        split: the split to read, by default train; of a file, the rows whose split column has this value.
        config: the configuration of a hub data set or of a clone of one.
    Raises:
        UserError: there is no such file or folder, or it holds nothing that can be read. The examples raise it, too: a
            column is missing, or a row is bad and bad rows are not skipped.
    """
    path, flags, reading = Path(name.removeprefix("hub:")), {"split", "config"}, Reading()
    if path.is_dir() and (beir := find_beir(path)):
        reading.shape = "a BEIR folder"
        reading.used = {"query": ["the text of queries"], "positive": ["title and text of corpus"]}
        return Source({"split"}, reading, read_beir(beir, split, bad, reading.notes))
    if path.is_dir():
        rows = _open_folder(path, config, split, bad, reading)
    elif name.startswith("hub:"):
        rows = _open_hub(path.as_posix(), config, split)
    elif path.exists():
        flags = {"split", "no_header"} if ending(path) in SEPARATED else {"split"}
        columns = replace(columns, split=split)  # of a folder and of the hub, the split is one of its own
        rows = read_rows(path, bad, no_header)
    else:
        raise UserError(f"{name}: no such file or folder (a data set of the hub is hub:NAME)")
    return Source(COLUMN_FLAGS | flags, reading, examples_of(rows, name, columns, bad, reading))


def _open_hub(name: str, config: str | None, split: str | None) -> Rows:
    """Download a split of a data set of the hub."""
    import datasets
    from huggingface_hub import constants

    from gritlm.models.hub import ask

    reason = ask(name, "dataset")
    if reason:  # what is in the cache is read all the same, at once
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        data = datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # errors of the library, the hub and the network have no common class
        raise load_error(f"hub:{name}", error, reason) from error
    return _numbered(f"hub:{name}", data)


def _open_folder(folder: Path, config: str | None, split: str | None, bad: BadRows, reading: Reading) -> Rows:
    """Open a split of a clone of a hub data set, or of a folder of `save_to_disk`. Files left out are noted."""
    import datasets
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # or it warns of each README.md without metadata
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            data: Any = datasets.load_from_disk(str(folder))
            if isinstance(data, datasets.DatasetDict):
                data = data[_choose(folder, data, split)]
            return _numbered(str(folder), data)
        splits = datasets.load_dataset_builder(str(folder), config).config.data_files or {}
    except UserError:
        raise
    except Exception as error:  # errors of the library have no common class
        raise load_error(str(folder), error) from error
    chosen = _choose(folder, splits, split)
    files = [Path(file) for file in splits[chosen]]
    if not is_test_split(Path(chosen)):  # the library takes for train what it has no split for
        files = [file for file in files if not is_test_split(Path(os.path.relpath(file, folder)))]
        if not files:
            raise FileError(f"{folder}: found test splits alone; name a file itself to read it")
    read = {file.resolve() for file in files}
    others = [file for file in list_files(folder) if ending(file) in TABLES and file.resolve() not in read]
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    named = ", ".join(str(file.relative_to(folder)) for file in others[:NAMED])
    reading.notes[f"files of the folder not read: {named}{more}"] = len(others)
    return (row for file in files for row in read_rows(file, bad))


def _choose(folder: Path, splits: Iterable[str], split: str | None) -> str:
    names = [*map(str, splits)]
    if (split or "train") in names:
        return split or "train"
    wanted = f"the split {split}" if split else "train, or the name of another split"
    raise FileError(f"{folder}: found the splits {', '.join(names) or 'none'}; wanted {wanted} (--split)")


def _numbered(name: str, data: Iterable[object]) -> Rows:
    return ((f"{name}:{number}", row) for number, row in enumerate(data, start=1))


def load_error(name: str, error: Exception, reason: str = "") -> UserError:
    """What failed in a library, in one line, with the flags that may mend it."""
    why = "; ".join(filter(None, (reason, one_line(error))))[:400]
    if name.startswith("hub:") and "'corpus'" in why and "'queries'" in why:
        command = f"hf download --repo-type dataset {name.removeprefix('hub:')} --local-dir FOLDER"
        why += f"; it is a retrieval set: {command} fetches it, and FOLDER is read"
    flags = " ".join(flag for word, flag in (("onfig", "(--config)"), ("split", "(--split)")) if word in why)
    return FileError(f"{name}: cannot be read: {why} {flags}".rstrip())
