"""The parser of the flags: one-line errors, a FILE.json as the first word, paths with ~."""

import argparse
import copy
import dataclasses
import json
import sys
from typing import Any, NoReturn, get_args, get_type_hints

from accelerate.parallelism_config import ParallelismConfig
from transformers import HfArgumentParser

from gritlm.cli import OneLineErrors, home_expanded
from gritlm.errors import UserError
from gritlm.strict_json import read_json_object
from gritlm.training.arguments import GROUPS, Command
from gritlm.training.inherited_flags import REFUSED
from gritlm.training.old_flags import OLD_FLAGS, OLD_VALUES

# Types of Hugging Face's flags that its parser makes of no text.
UNREADABLE = (ParallelismConfig | None, dict[str, bool] | None)

# Flags in which ~ is the home folder.
PATHS = (
    *("model_name_or_path", "train_data", "num_samples", "data_cache", "eval_data", "teacher_vectors"),
    *("output_dir", "resume_from_checkpoint", "deepspeed", "fsdp_config"),
)


# Flags for which null in a FILE.json is no value.
NEVER_NONE = {
    f.name
    for group in GROUPS
    for f in dataclasses.fields(group)
    if f.default is not None and type(None) not in get_args(get_type_hints(group)[f.name])
}


class FlagParser(OneLineErrors, HfArgumentParser):
    """HfArgumentParser without abbreviations, whose errors are one line, and whose first word may be a FILE.json.

    Attributes:
        command: what `parse_args` has read.
    """

    hints = OLD_FLAGS

    @staticmethod
    def _parse_dataclass_field(parser, field):
        paper, field = field.metadata.get("paper"), copy.copy(field)  # argparse does not know our marks
        marks = ("changes_learning", "paper")
        field.metadata = {name: value for name, value in field.metadata.items() if name not in marks}
        if field.name in REFUSED and field.type in UNREADABLE:  # so that any value gets to the refusal
            field.type = str | None
        if field.name == "include_num_input_tokens_seen":  # a word, or a switch as it was in transformers 4
            field.type, field.metadata = str, field.metadata | {"nargs": "?", "const": "all"}
        if field.type == bool | None and field.default is None:  # a switch as well
            field.metadata |= {"nargs": "?", "const": True}
        HfArgumentParser._parse_dataclass_field(parser, field)
        if paper is True:  # as Hugging Face has it for flags whose default is True
            parser.add_argument(f"--no_{field.name}", action="store_false", dest=field.name, default=None)

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        self.command = Command(words)
        if words and words[0].endswith(".json"):
            words = [*self._read_file(home_expanded(words[0])), *words[1:]]
        found = super().parse_args(words, namespace)
        own = self.command.words if self.command.repeats else words
        named = {word.lstrip("-").partition("=")[0].replace("-", "_") for word in own if word.startswith("--")}
        self.command.parsed = dict(vars(found))
        self.command.given = {n: v for n, v in vars(found).items() if n in named or f"no_{n}" in named}
        return found

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        for name in PATHS:
            if isinstance(value := getattr(found, name, None), str):
                setattr(found, name, home_expanded(value))
            elif isinstance(value, list):
                setattr(found, name, [home_expanded(path) for path in value])
        return found, unknown

    def error(self, message: str) -> NoReturn:
        name = message.removeprefix("argument --").partition(":")[0]
        super().error(f"{message}; {OLD_VALUES[name]}" if name in OLD_VALUES else message)

    def _read_file(self, path: str) -> list[str]:
        """The flags of a JSON file as words, or those of the run whose run.json it is."""
        content = read_json_object(path, wanted="a JSON object of flags")
        if "format" in content and "flags" in content:
            if "resolved" not in content:
                raise UserError(
                    f"{path}: found the run.json of gritlm {content.get('version', '0.1.0')}, which does not hold "
                    "every flag; wanted one of a newer version, or a file of flags"
                )
            self.command.repeats, content = content, content["resolved"]
        actions = {action.dest: action for action in self._actions}
        words: list[str] = []
        for key, value in content.items():
            name = key.replace("-", "_")
            if name not in actions:
                raise UserError(f"{path}: {self._unknown('--' + key)}")
            if value is None:
                if name in NEVER_NONE:
                    raise UserError(f"{path}: {key}: found null, wanted a value, or no such entry")
                self.set_defaults(**{name: None})
            elif isinstance(value, list) and actions[name].nargs == "+":
                words += [f"--{name}", *map(str, value)]
            elif isinstance(value, list):
                words.append(f"--{name}={','.join(map(str, value))}")
            else:
                words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
        return words


def make_parser(verb: str, groups: tuple[type, ...], examples: str) -> FlagParser:
    parser: Any = FlagParser  # to mypy, argparse's constructor
    return parser(
        groups,
        prog=f"gritlm {verb}",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
