"""placeholder of the page, replaced by the merge of its branch"""

from pathlib import Path


def write(folder: Path) -> None:
    pass
