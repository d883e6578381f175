"""Read data sets of the Hugging Face hub."""

from collections.abc import Iterator

from gritlm.data.columns import Columns, examples_of
from gritlm.data.raw import RawExample
from gritlm.errors import UserError, one_line


def read_hub(name: str, config: str | None, split: str, columns: Columns) -> Iterator[RawExample]:
    """Download a data set of the Hugging Face hub and read its rows.

    Raises:
        UserError: the data set cannot be loaded or lacks a column.
    """
    import datasets
    from huggingface_hub import constants

    from gritlm.models.hub import ask

    reason = ask(name, "dataset")
    if reason:  # what is in the cache is read all the same, at once
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # errors of the library, the hub and the network have no common class
        why = "; ".join(filter(None, (reason, one_line(error))))
        raise UserError(f"hub:{name}: cannot be read: {why[:300]}") from error
    rows = ((f"hub:{name}:{number}", row) for number, row in enumerate(data, start=1))
    yield from examples_of(rows, f"hub:{name}", data.column_names, columns)
