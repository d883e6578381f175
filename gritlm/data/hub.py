"""Read data sets of the Hugging Face hub, local clones of them, and folders of `save_to_disk`, a split at a time."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gritlm.data.containers import FileError
from gritlm.data.folders import is_test_split, list_files
from gritlm.data.raw import BadRows
from gritlm.data.tables import TABLES, ending, read_rows
from gritlm.errors import UserError, one_line

Rows = Callable[[BadRows], Iterator[tuple[str, object]]]
NAMED = 5  # files that a note names


def open_hub(name: str, config: str | None, split: str | None) -> Rows:
    """Download a split of a data set of the hub, by default train. The rows start again at each call.

    Raises:
        UserError: the data set cannot be loaded, or has no such split or configuration.
    """
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


def open_folder(folder: Path, config: str | None, split: str | None) -> tuple[Rows, dict[str, int]]:
    """Open a split of a clone of a hub data set, or of a folder of `save_to_disk`, by default train.

    Returns:
        what starts the rows, and a note with the number of files that are left out.
    Raises:
        UserError: the folder cannot be read, or has no such split or configuration.
    """
    import datasets
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # or it warns of each README.md without metadata
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            data: Any = datasets.load_from_disk(str(folder))
            if isinstance(data, datasets.DatasetDict):
                data = data[_choose(folder, data, split)]
            return _numbered(str(folder), data), {}
        found = datasets.load_dataset_builder(str(folder), config).config.data_files
    except UserError:
        raise
    except Exception as error:  # errors of the library have no common class
        raise load_error(str(folder), error) from error
    splits = {str(name): [Path(file) for file in files] for name, files in (found or {}).items()}
    files = splits[chosen := _choose(folder, splits, split)]
    if not is_test_split(Path(chosen)):  # the library takes for train what it has no split for
        files = [file for file in files if not is_test_split(Path(os.path.relpath(file, folder)))]
        if not files:
            raise FileError(f"{folder}: found test splits alone; name a file itself to read it")
    read = {file.resolve() for file in files}
    others = [file for file in list_files(folder) if ending(file) in TABLES and file.resolve() not in read]
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    named = ", ".join(str(file.relative_to(folder)) for file in others[:NAMED])
    notes = {f"files of the folder not read: {named}{more}": len(others)}
    return lambda bad: (row for file in files for row in read_rows(file, bad)), notes


def _choose(folder: Path, splits: Iterable[str], split: str | None) -> str:
    names = [*splits]
    if (split or "train") in names:
        return split or "train"
    wanted = f"the split {split}" if split else "train, or the name of another split"
    raise FileError(f"{folder}: found the splits {', '.join(names) or 'none'}; wanted {wanted} (--split)")


def _numbered(name: str, data: Iterable[object]) -> Rows:
    return lambda bad: ((f"{name}:{number}", row) for number, row in enumerate(data, start=1))


def load_error(name: str, error: Exception, reason: str = "") -> UserError:
    """What failed in a library, in one line, with the flags that may mend it."""
    why = "; ".join(filter(None, (reason, one_line(error))))[:400]
    if name.startswith("hub:") and "'corpus'" in why and "'queries'" in why:
        command = f"hf download --repo-type dataset {name.removeprefix('hub:')} --local-dir FOLDER"
        why += f"; it is a retrieval set: {command} fetches it, and FOLDER is read"
    flags = " ".join(flag for word, flag in (("onfig", "(--config)"), ("split", "(--split)")) if word in why)
    return FileError(f"{name}: cannot be read: {why} {flags}".rstrip())
