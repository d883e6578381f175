"""One door to public data: a file, a folder or a data set of the hub, told apart, with the flags that it takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from gritlm.data.beir import BeirFolder, find_beir, read_beir
from gritlm.data.columns import Columns, Reading, examples_of
from gritlm.data.hub import Rows, open_folder, open_hub
from gritlm.data.raw import BadRows, RawExample
from gritlm.data.tables import SEPARATED, ending, read_rows
from gritlm.errors import UserError

COLUMN_FLAGS = {
    *("query_column", "positive_column", "negative_columns", "label_column", "positive_above", "positive_labels"),
    *("score_column", "ignore_columns", "accept_numbers"),
}
SOURCE_FLAGS = COLUMN_FLAGS | {"split", "config", "no_header"}


@dataclass
class Source:
    """Where examples come from."""

    used: set[str]  # the flags that have an effect on this kind of input
    read: Callable[[BadRows, Reading], Iterator[RawExample]]
    reading: Reading = field(default_factory=Reading)  # of the latest call of `examples`

    def examples(self, bad: BadRows) -> Iterator[RawExample]:
        """Read the examples from the start; may be called again.

        Raises:
            UserError: the source cannot be read or lacks a column, or a row is bad and bad rows are not skipped.
        """
        self.reading = Reading()
        return self.read(bad, self.reading)


def open_source(
    name: str, columns: Columns, split: str | None = None, config: str | None = None, no_header: bool = False
) -> Source:
    """Tell what kind of input a name is: hub:NAME, a file, a BEIR folder, or a folder of splits.

    Args:
        columns: which columns to read; a BEIR folder leaves no choice.
        split: the split to read, by default train; of a file, the rows whose split column has this value.
        config: the configuration of a hub data set or of a clone of one.
    Raises:
        UserError: there is no such file or folder, or it holds nothing that can be read.
    """
    path, table = Path(name), replace(columns, split=split or columns.split)
    columns = replace(columns, split=None)  # of a folder and of the hub, the split is one of its own
    if name.startswith("hub:") and not Path(name.removeprefix("hub:")).is_dir():
        return _columns(open_hub(name.removeprefix("hub:"), config, split), name, columns, {"split", "config"})
    path = Path(name.removeprefix("hub:"))
    if path.is_dir():
        if beir := find_beir(path):
            return Source({"split"}, lambda bad, reading: _beir(beir, split, bad, reading))
        rows, notes = open_folder(path, config, split)
        return _columns(rows, name, columns, {"split", "config"}, notes)
    if not path.exists():
        raise UserError(f"{name}: no such file or folder (a data set of the hub is hub:NAME)")
    flags = {"split", "no_header"} if ending(path) in SEPARATED else {"split"}
    return _columns(lambda bad: read_rows(path, bad, no_header), name, table, flags)


def _beir(folder: BeirFolder, split: str | None, bad: BadRows, reading: Reading) -> Iterator[RawExample]:
    reading.shape = "a BEIR folder"
    reading.used = {"query": ["the text of queries"], "positive": ["title and text of corpus"]}
    return read_beir(folder, split, bad, reading.notes)


def _columns(rows: Rows, name: str, columns: Columns, flags: set[str], notes: dict[str, int] | None = None) -> Source:
    def read(bad: BadRows, reading: Reading) -> Iterator[RawExample]:
        start = len(bad.messages)

        def again() -> Iterator[tuple[str, object]]:
            del bad.messages[start:]  # of an earlier look at the same rows
            return rows(bad)

        yield from examples_of(again, name, columns, bad, reading)
        reading.notes.update(notes or {})

    return Source(COLUMN_FLAGS | flags, read)
