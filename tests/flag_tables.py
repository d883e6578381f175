"""The tables of flags in docs/training.md, in Markdown, as the code's own tables give them."""

import dataclasses

from transformers import TrainingArguments

from gritlm.training import arguments
from gritlm.training.inherited_flags import NO_EFFECT, REFUSED
from gritlm.training.old_flags import OLD_FLAGS


def flag_table() -> str:
    """The table of this project's flags in docs/training.md, in Markdown."""
    rows = ["| flag | default | what it does |", "|---|---|---|"]
    inherited = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    for group in arguments.GROUPS:
        for f in dataclasses.fields(group):
            # Hugging Face's switches that are left off are not for users to turn.
            if f.name in inherited and (f.default == inherited[f.name] or f.metadata["help"].startswith("Left off")):
                continue
            default = f"the base's, else `{f.metadata['paper']}`" if "paper" in f.metadata else f"`{f.default}`"
            rows.append(f"| `--{f.name}` | {default} | {f.metadata['help']} |")
    return "\n".join(rows)


def inherited_flag_table() -> str:
    """The table in docs/training.md of Hugging Face's flags that are not used, in Markdown."""
    rows = ["| flag of Hugging Face | here |", "|---|---|"]
    for use, table in (("refused", REFUSED), ("no effect", NO_EFFECT)):
        names_by_why: dict[str, list[str]] = {}
        for name, why in table.items():
            names_by_why.setdefault(why, []).append(f"`--{name}`")
        rows += [f"| {', '.join(names)} | {use}: {why} |" for why, names in names_by_why.items()]
    return "\n".join(rows)


def old_flag_table() -> str:
    """The table "flags of the original -> here" of docs/training.md, in Markdown. Flags with one hint share a row."""
    rows = ["| flag | here |", "|---|---|"]
    for hint in dict.fromkeys(OLD_FLAGS.values()):
        names = ", ".join(f"`--{name}`" for name, text in OLD_FLAGS.items() if text == hint)
        rows.append(f"| {names} | {hint} |")
    return "\n".join(rows)
