"""The instruction of each benchmark task: the user's, else that of prompts.json, else a sentence for its type."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from gritlm.errors import UserError
from gritlm.evaluation.sets import Side
from gritlm.strict_json import read_json_object

TEMPLATE = "Instruct: {instruction}\nQuery: "
Source = Literal["gritlm", "file", "type"]
# (task, its subset or None), (type, a task or None) or ("default", None) -> side -> what is put before a text.
Table = dict[tuple[str, str | None], dict[Side, str]]

OWN = Path(__file__).with_name("prompts.json")
DEFAULT = "default"
# The names of the two sides in the prompts files of mteb, sentence-transformers, GritLM and Qwen3-Embedding.
SIDES: dict[str, Side] = {
    "query": "query",
    "instruction": "query",
    "prompt": "query",
    "passage": "passage",
    "document": "passage",
    "corpus": "passage",
}
# Prompts that need no template: "Instruct: a\nQuery: ", "query: ", "task: a | query: ", "<|user|>\na\n<|embed|>\n".
WHOLE = re.compile(r"Instruct:|Query:\s*\Z|(?:\A|[|\n])\s*\w+:\s*\Z|<\|embed\|>\s*\Z")
PLACEHOLDER = re.compile(r"\{(?:instruction|query|text|passage|document|title)?\}")
# FEVER, FEVERHardNegatives, FEVERHardNegatives.v2 and NanoFEVERRetrieval ask for the same.
VARIANT = re.compile(r"\ANano|(?:Retrieval)?(?:HardNegatives)?(?:\.v\d+)?\Z")


class Prompts:
    """What is put before the texts of each benchmark task.

    Args:
        file: the user's prompts; docs/evaluation.md has the form.
        template: what an instruction is put into; a backslash and an n are a line break.
    Raises:
        UserError: the file or the template is wrong.
    """

    def __init__(self, file: str | None = None, template: str = TEMPLATE) -> None:
        if re.findall(r"\{\w*\}", template) != ["{instruction}"]:
            raise UserError(f"--instruction_template: found {template!r}, wanted {{instruction}} once, no other braces")
        self._file, self._template = f"--prompts {file}", template.replace("\\n", "\n")
        self._whole: list[str] = []  # names of tasks whose prompt is used without the template
        self._user = {} if file is None else self._read(read_json_object(file, "--prompts"), self._file)
        if file is not None and not self._user:
            raise UserError(f'{self._file}: found no task, wanted {{"TaskName": "its instruction"}}')
        self._own = self._read(json.loads(OWN.read_text(encoding="utf-8")), OWN.name)
        self._variants = {_stem(name): name for name, _ in self._own}

    def instruction(self, task: str, task_type: str, side: Side, subset: str | None = None) -> str:
        """What is put before each text of one side; "" for nothing.

        In a task whose two sides are alike, such as STS or bitext mining, all texts are queries. Passages have an
        instruction only where the most specific entry gives one.
        """
        own_name = self._variants.get(_stem(task), task)
        found = [self._user.get(key) for key in _keys(task, task_type, subset)]
        found += [self._own.get(key) for key in _keys(own_name, task_type, subset)]
        entries = [entry for entry in found if entry is not None]
        if side == "passage":
            return entries[0].get("passage", "")
        return next(entry["query"] for entry in entries if "query" in entry)

    def source_of(self, task: str, task_type: str) -> Source:
        """Where the query's instruction is from: the user's file, prompts.json by name, or prompts.json by type."""
        subset = next((subset for name, subset in self._user if name == task), None)
        if any("query" in self._user.get(key, {}) for key in _keys(task, task_type, subset)):
            return "file"
        return "gritlm" if _stem(task) in self._variants else "type"

    def fingerprint(self, tasks: Iterable[tuple[str, str]]) -> str:
        """A hash of all that `instruction` gives for tasks, each a name and a type, in any order."""
        sides: tuple[Side, ...] = get_args(Side)
        prompts = {
            f"{task}/{subset}": [self.instruction(task, task_type, side, subset) for side in sides]
            for task, task_type in tasks
            for subset in {None, *(subset for name, subset in [*self._user, *self._own] if name == task)}
        }
        return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:16]

    def notes(self, tasks: Sequence[tuple[str, str]]) -> list[str]:
        """Lines to print before the evaluation of tasks, each a name and a type; none if there is nothing to say."""
        sources = {task: self.source_of(task, task_type) for task, task_type in tasks}
        lines = []
        if self._user:
            count = list(sources.values()).count("file")
            lines.append(f"{self._file}: gives the instruction of {count} of {len(sources)} tasks")
            if unknown := self._unknown(sources.keys()):
                lines.append(f"{self._file}: mteb has no {_some(unknown)}")
        if self._whole:
            lines.append(f"{self._file}: whole prompts, used without --instruction_template: {_some(self._whole)}")
        if by_type := [task for task, source in sources.items() if source == "type"]:
            lines.append(f"no instruction for {_some(by_type)}: used a sentence for the task type; see --prompts")
        return lines

    def _unknown(self, evaluated: Collection[str]) -> list[str]:
        """Tasks and subsets of the user's file that neither mteb nor this evaluation has."""
        import mteb
        from mteb.abstasks.task_metadata import TaskType

        unknown = []
        for name, subset in sorted(self._user.keys() - self._own.keys(), key=str):
            task, part = (subset, None) if subset and name in get_args(TaskType) else (name, subset)
            try:
                if part not in (None, *mteb.get_task(task).metadata.hf_subsets):
                    unknown.append(f"{task}/{part}")
            except KeyError as error:
                if task not in evaluated:
                    likely = re.search(r"Did you mean: '(.+?)'", str(error))
                    unknown.append(f"{task} (did you mean {likely[1]}?)" if likely else task)
        return unknown

    # ---- reading

    def _read(self, found: dict[str, Any], where: str) -> Table:
        table: Table = {}
        # "FEVER-query" changes what "FEVER" gives, so it comes after it.
        for name, value in sorted(found.items(), key=lambda item: _side_of(item[0]) is not None):
            place, side = f"{where}: {name}", _side_of(name)
            if side is not None:
                task = name.rpartition("-")[0] or DEFAULT
                table.setdefault((task, None), {})[side] = self._prompt(value, place, task)
            elif not isinstance(value, dict) or not value or value.keys() & SIDES.keys():
                table[name, None] = self._entry(value, place, name)
            else:
                table |= {(name, part): self._entry(prompt, f"{place}: {part}", name) for part, prompt in value.items()}
        return table

    def _entry(self, value: object, place: str, task: str) -> dict[Side, str]:
        if not isinstance(value, dict):
            return {"query": self._prompt(value, place, task)}
        sides = [SIDES.get(key) for key in value]
        if None in sides or len(sides) != len({*sides}) or not sides:
            raise UserError(f'{place}: found the keys {list(value)[:5]}, wanted "query", or "query" and "passage"')
        return {SIDES[key]: self._prompt(text, f"{place}: {key}", task) for key, text in value.items()}

    def _prompt(self, text: object, place: str, task: str) -> str:
        """The text in the template, or as it is where it is blank or a whole prompt."""
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
            raise UserError(f"{place}: found {json.dumps(text)[:60]}, wanted a string of valid Unicode")
        if found := PLACEHOLDER.search(text):
            raise UserError(f"{place}: found {found[0]}, wanted the instruction alone: its text comes after it")
        if WHOLE.search(text):
            self._whole.append(task)
            return text
        return self._template.replace("{instruction}", text) if text.strip() else ""


def _keys(task: str, task_type: str, subset: str | None) -> list[tuple[str, str | None]]:
    """Where the prompts of a task may be, the most specific place first."""
    return [(task, subset), (task, None), (task_type, task), (task_type, None), (DEFAULT, None)]


def _stem(task: str) -> str:
    return VARIANT.sub("", task).lower()


def _side_of(name: str) -> Side | None:
    return SIDES.get(name.rpartition("-")[2])


def _some(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
