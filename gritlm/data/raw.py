"""What the readers of public data give: examples that are not yet checked, and the errors of bad rows."""

from dataclasses import dataclass, field

from gritlm.errors import UserError


@dataclass
class RawExample:
    """One query with its passages, not yet checked; `where` is file:line."""

    where: str
    query: object
    positives: list[object]
    negatives: list[object]
    positive_scores: list[float] | None = None  # in step with the positives
    negative_scores: list[float] | None = None
    score: float | None = None  # of the pair
    instruction: str | None = None  # the row's own, as a sentence; --instruction_template makes it the prefix


@dataclass
class BadRows:
    """The errors of bad rows: raised at once with `hint` appended, or collected where bad rows are skipped."""

    skip: bool = False
    hint: str = ""
    messages: list[str] = field(default_factory=list)

    def add(self, error: UserError) -> None:
        if not self.skip:
            raise UserError(f"{error}{self.hint}") from error
        self.messages.append(str(error))
