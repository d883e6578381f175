"""The instructions that `prepare` puts before queries and passages."""

from collections import Counter

from gritlm.data.raw import RawExample
from gritlm.errors import UserError
from gritlm.evaluation.prompts import TEMPLATE, WHOLE

PLACE = "{instruction}"


class Instructions:
    """Instructions for all rows, or a template for those that the rows have.

    Args:
        query: a sentence, put into the template, or a whole prompt such as "query: ".
        template: one without {instruction} goes before the queries as it is.
        passage: goes before the passages as it is.
    """

    def __init__(self, query: str = "", template: str | None = None, passage: str = ""):
        self.query, self.counts = query.strip(), Counter[str]()
        self.own = 0  # rows with an instruction of their own
        self.template, self.passage = (text and text.replace("\\n", "\n") for text in (template, passage))
        if self.template and (self.template.count("{") != self.template.count(PLACE) or self.template.count("{") > 1):
            raise UserError(f"--instruction_template: found {template!r}, wanted {PLACE} at most once, no other braces")
        if self.template and PLACE not in self.template and query:
            raise UserError(f"--instruction_template: found {template!r}, wanted {PLACE} in it, for --instruction")
        for flag, text in (("instruction_template", self.template), ("passage_instruction", self.passage)):
            if text and text[-1].isascii() and not text[-1].isspace():
                raise UserError(f"--{flag}: found {text!r}, wanted white space at its end: the text comes next")

    def before_query(self, example: RawExample) -> object:
        """The query of an example, [instruction, text] if there is an instruction.

        Raises:
            UserError: it has an instruction of its own and a flag gives another, or a template and no instruction.
        """
        own, template = (example.instruction or "").strip(), self.template or TEMPLATE
        if own and (self.query or PLACE not in template):
            raise _two("--instruction" if self.query else "--instruction_template", example.where, own)
        self.own += bool(own)
        sentence = own or self.query
        if sentence or PLACE not in template:
            return self._before(example.query, sentence, template, "--instruction", example.where)
        if self.template:
            raise UserError(f"--instruction_template: found no instruction in {example.where}, wanted --instruction")
        return example.query

    def before_passage(self, value: object, where: str) -> object:
        return self._before(value, "", self.passage, "--passage_instruction", where) if self.passage else value

    def _before(self, value: object, sentence: str, template: str, flag: str, where: str) -> object:
        prefix = template.replace(PLACE, sentence)
        if WHOLE.search(sentence):
            prefix = sentence if sentence[-1].isspace() else f"{sentence} "
        if isinstance(value, list) and value and isinstance(value[0], str):
            if value[0].strip() != prefix.strip():
                raise _two(flag, where, value[0])
            return value
        for known in (prefix.strip(), sentence.strip()):
            if isinstance(value, str) and known and value.startswith(known) and value[len(known) :].strip(" \n:"):
                text = value[len(known) :].lstrip(" \n:")
                self.counts["texts that begin with their instruction, not given it again"] += 1
                return [value[: -len(text)], text]
        return [prefix, value]

    def lines(self) -> list[str]:
        """Lines for the card."""
        said = self.query or (f"that of the row in {self.own} rows, none in others" if self.own else "none")
        if self.template:
            said = f"{said}, in {self.template!r}" if PLACE in self.template else repr(self.template)
        lines = [f"instruction: {said}", *([f"instruction of passages: {self.passage!r}"] if self.passage else [])]
        return lines + [f"{count} {what}" for what, count in self.counts.items() if count]


def _two(flag: str, where: str, found: str) -> UserError:
    return UserError(
        f"{flag}: {where} has the instruction {found[:60]!r} already; leave {flag} out, or the column of instructions "
        "(--ignore_columns)"
    )
