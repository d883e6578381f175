"""What readers of public data are asked, and what they give: examples not yet checked, bad rows, a description."""

from collections import Counter
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
    is_positive: bool | None = None  # what the row's label says of its positives


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


@dataclass
class Columns:
    """The columns to read; None: the usual name that the file has."""

    query: str | None = None
    positive: str | None = None
    negatives: list[str] | None = None
    label: str | None = None  # the column that tells whether the positive is one
    positive_above: float | None = None
    positive_labels: list[str] | None = None
    score: str | None = None  # the column that tells how alike the two texts of a pair are
    ignore: list[str] = field(default_factory=list)  # columns that are left unread on purpose; "*": all others
    accept_numbers: bool = False  # numbers are texts
    split: str | None = None  # the rows to read where a column names the split


@dataclass
class Reading:
    """What became of the columns of a source, and counts of what was left out."""

    shape: str = ""
    used: dict[str, list[str]] = field(default_factory=dict)  # query, positive, negative, ... -> columns
    also: dict[str, list[str]] = field(default_factory=dict)  # the same -> columns that could have been it
    unread: list[str] = field(default_factory=list)
    doubtful: dict[str, str] = field(default_factory=dict)  # unread column -> its values, few or small numbers
    notes: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """Lines for the screen and the card."""
        also = {role: f" (also there: {', '.join(names)})" for role, names in self.also.items() if names}
        said = [f"{role} <- {' + '.join(names)}{also.get(role, '')}" for role, names in self.used.items() if names]
        unread = [f"{n} ({self.doubtful[n]}: a label?)" if n in self.doubtful else n for n in self.unread]
        line = (f"{self.shape}: " if self.shape else "") + ", ".join(said)
        line += f"; not read: {', '.join(unread)}" if unread else ""
        return [*filter(None, [line]), *(f"{count} {kind}" for kind, count in self.notes.items() if count)]
