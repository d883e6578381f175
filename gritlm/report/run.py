"""Read what a run has left in its folder: run.json, log.jsonl and evaluation/. Nothing is trusted to be whole."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gritlm.errors import UserError, first_line
from gritlm.strict_json import read_json_object

RUN_FILE, LOG_FILE, EVALUATION = "run.json", "log.jsonl", "evaluation"
CHECKPOINT = "checkpoint-"
WEIGHT_COPIES = "weights"  # in a run's folder: the model folders step-N of --merge_last
# Entries of a log line with a loss that are no loss term.
_NO_TERM = {
    *("step", "loss", "grad_norm", "learning_rate", "epoch", "tokens_per_second", "real_token_share"),
    *("peak_memory_gb", "num_input_tokens_seen"),
}


@dataclass
class Run:
    """A run, finished or not."""

    folder: Path
    settings: dict[str, Any]  # run.json
    curves: dict[str, dict[int, float]] = field(default_factory=dict)  # key of log.jsonl -> step -> value, by step
    terms: list[str] = field(default_factory=list)
    times: list[str] = field(default_factory=list)  # when the first and the last line were logged
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)  # step -> evaluation/step-N.json
    notes: list[str] = field(default_factory=list)  # what could not be read

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def flags(self) -> dict[str, Any]:
        """Every flag's value, or of an older run those that a continuation must agree on."""
        return self.settings.get("resolved") or self.settings.get("flags") or {}

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Command, versions and machine of each start, whole: run.json keeps what differs from the first."""
        starts = self.settings.get("starts") or [{}]
        return [starts[0] | start for start in starts]

    @property
    def last_step(self) -> int:
        return max(self.curves.get("loss", {}), default=0)

    @property
    def published_step(self) -> int:
        """The step of the model that the run has published, or would publish."""
        best = (self.settings.get("evaluation") or {}).get("step")
        return best if isinstance(best, int) else self.last_step

    def under(self, prefix: str) -> dict[str, dict[int, float]]:
        """The curves whose key begins with a prefix, by the rest of the key."""
        return {key.removeprefix(prefix): curve for key, curve in self.curves.items() if key.startswith(prefix)}

    def evaluation_curves(self) -> dict[str, dict[int, float]]:
        """The main metric of each evaluation set over the steps."""
        curves: dict[str, dict[int, float]] = {}
        for step, content in self.evaluations.items():
            for row in content["sets"]:
                curves.setdefault(f"{row['name']}, {row['main']}", {})[step] = row["metrics"][row["main"]]
        return curves

    def data_sets(self) -> list[dict[str, Any]]:
        """Name, rows and fingerprint of each data set. run.json of an older run has no names."""
        if found := self.starts[0].get("data sets"):
            return found
        entries = (self.settings.get("flags") or {}).get("data") or []
        named = entries.items() if isinstance(entries, dict) else [("", entry) for entry in entries]
        parts = [(name, str(entry).split(" rows, ")) for name, entry in named]
        return [{"name": name, "rows": part[0], "fingerprint": part[-1]} for name, part in parts]

    def results(self, step: int | None = None) -> list[dict[str, Any]]:
        """The results on each evaluation set at a step; None is that of the published model."""
        return self.evaluations.get(self.published_step if step is None else step, {}).get("sets", [])


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: it holds no run, or its run.json is damaged.
    """
    if not (folder / RUN_FILE).is_file():
        inside = folder.name.startswith(CHECKPOINT) and (folder.parent / RUN_FILE).is_file()
        hint = f"; its run is {folder.parent}" if inside else ""
        found = f"no {RUN_FILE} there" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: found {found}, wanted the folder of a run{hint}")
    settings = read_json_object(str(folder / RUN_FILE), wanted="what gritlm train writes")
    starts = settings.get("starts", [])
    objects = [settings.get(name, {}) for name in ("resolved", "evaluation")] + [settings.get("flags"), *starts]
    if not isinstance(starts, list) or not all(isinstance(found, dict) for found in objects):
        raise UserError(f"{folder / RUN_FILE}: found another form, wanted a file of gritlm train")
    run = Run(folder, settings)
    _read_log(run)
    _read_evaluations(run)
    return run


def find_run(folder: Path) -> tuple[Run | None, int | None]:
    """The run whose model a folder holds, and the step of a checkpoint; (None, None) where there is no run.json."""
    if (folder / RUN_FILE).is_file():
        return read_run(folder), None
    kind, _, step = folder.name.rpartition("-")
    run = folder.parent.parent if (folder.parent.name, kind) == (WEIGHT_COPIES, "step") else folder.parent
    if step.isdigit() and (run != folder.parent or f"{kind}-" == CHECKPOINT) and (run / RUN_FILE).is_file():
        return read_run(run), int(step)
    return None, None


def _read_log(run: Run) -> None:
    path = run.folder / LOG_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    unread = 0
    for line in lines:
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            unread += 1
            continue
        run.times = [*run.times[:1], str(entry.get("time", ""))]
        for key, value in entry.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                run.curves.setdefault(key, {})[step] = float(value)
                if "loss" in entry and "/" not in key and key not in {*_NO_TERM, *run.terms}:
                    run.terms.append(key)
    run.curves = {key: dict(sorted(curve.items())) for key, curve in run.curves.items()}
    if unread:
        run.notes.append(f"{LOG_FILE}: {unread} of {len(lines)} lines could not be read and are left out")


def _read_evaluations(run: Run) -> None:
    for path in (run.folder / EVALUATION).glob("step-*.json"):
        if not (step := path.stem.removeprefix("step-")).isdigit():
            continue
        try:
            run.evaluations[int(step)] = read_results(path)
        except UserError as error:
            run.notes.append(f"{EVALUATION}/{path.name} could not be read and is left out ({first_line(error)})")
    run.evaluations = dict(sorted(run.evaluations.items()))


def read_results(path: Path) -> dict[str, Any]:
    """A results file of a run or of `gritlm evaluate`.

    Raises:
        UserError: it is none.
    """
    content = read_json_object(str(path), wanted="results of gritlm evaluate")
    try:
        return content | {"sets": [_result(row) for row in content["sets"]]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: found no results of gritlm evaluate in it ({found})") from error


def _result(row: dict[str, Any]) -> dict[str, Any]:
    """The results on one set, with numbers where there should be numbers."""
    metrics = {str(name): float(value) for name, value in row["metrics"].items()}
    space = {
        name: list(map(int, value)) if isinstance(value, list) else float(value)
        for name, value in (row.get("space") or {}).items()
    }
    values = list(map(float, row.get("values") or []))
    metrics[row["main"]]  # a KeyError where there is none
    compressed = [
        {key: int(form[key]) for key in ("width", "bytes")}
        | {"precision": str(form["precision"])}
        | {of: float(form[of]["ndcg@10"]) for of in ("metrics", "metrics of float32 queries")}
        for form in row.get("compressed") or []
    ]
    found = {"metrics": metrics, "space": space, "values": values, "compressed": compressed}
    return row | found | {"name": str(row["name"])}
