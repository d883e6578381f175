"""Where a model comes from: its base, or the models that it was merged from; their licences and data."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import metadata_load

from gritlm.models.hub import is_hub_name, snapshot
from gritlm.report.markdown import code, plain, table
from gritlm.report.run import Run

CARD = "README.md"


class Base:
    """The base of a model: its names on the hub where they are known, how to call it, and the data of its own card.

    Args:
        given: its name or its folder; "" where it is unknown.
    """

    def __init__(self, given: str):
        folder = Path(given) if Path(given).is_dir() else (snapshot(given) if is_hub_name(given) else None)
        self.card: dict[str, Any] = {}
        if folder and (folder / CARD).is_file():
            with suppress(Exception):  # whatever is wrong with a card of others: it says nothing
                self.card = metadata_load(folder / CARD) or {}
        self.licence = {key: self.card.get(key) for key in ("license", "license_name", "license_link")}
        on_hub = bool(given) and is_hub_name(given) and not Path(given).exists()
        named = given if on_hub else self.card.get("base_model") or []
        self.names = [named] if isinstance(named, str) else [*map(str, named)]
        self.called = code(given) if on_hub else f"the local folder {code(Path(given).name)}" if given else "unknown"
        if self.names and not on_hub:
            self.called += f", which was made from {code(', '.join(self.names))}"
        self.licence_name = str(self.licence["license_name"] or self.licence["license"] or "")


class Part(NamedTuple):
    """A model that a merged one was made from."""

    name: str  # its folder, or its name on the hub
    weight: float
    fingerprint: str  # of its weights
    run: Run | None  # which trained it
    step: int | None  # of a checkpoint

    @property
    def base(self) -> Base:
        """The base of its run. Without a run: what its own card says."""
        return Base(str((self.run.flags if self.run else {}).get("model_name_or_path") or self.name))


def parts_table(parts: Sequence[Part]) -> list[str]:
    """The models that a merged one was made from, in their order."""
    rows = []
    for part in parts:
        called = part.run.name if part.run else Path(part.name).name if Path(part.name).exists() else part.name
        step = f", step {part.step}" if part.step is not None else ""
        licence = plain(part.base.licence_name or "unknown")
        rows.append((code(called) + step, f"{part.weight:.4g}", code(part.fingerprint), licence))
    return table(["Model", "weight", "fingerprint of its weights", "licence of its base"], rows)


def sources(run: Run | None) -> list[str]:
    """The names on the hub of the training data, from the cards that `gritlm prepare` has written beside it."""
    given, found = run.flags.get("train_data") if run else None, []
    for folder in map(Path, [given] if isinstance(given, str) else given or []):
        for path in (folder / CARD, folder.parent / CARD):
            with suppress(OSError, ValueError):
                found += re.findall(r"^- source: hub:(\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return sorted(set(found))
