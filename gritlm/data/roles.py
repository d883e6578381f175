"""Which column of a source is the query, which are its positives, its negatives, its label; told by usual names."""

import re
from collections import Counter
from dataclasses import dataclass, field

from gritlm.data.cells import clip, looks_like_ids, pairs_in, texts_in
from gritlm.data.shapes import SCORES, Shape, is_label, is_split, normal
from gritlm.errors import UserError

# Usual column names in normal form (`shapes.normal`), by preference.
QUERY = (
    *("query", "anchor", "question", "sentence1", "claim", "query_text", "question1", "premise", "sent0", "text1"),
    *("user_input", "user_query", "question_text", "question_title", "queries", "docstring"),
    *("title", "instruction", "prompt"),
)
ANSWER = ("answer", "answers", "response", "output", "best_answer", "long_answer", "completion", "reply", "solution")
PASSAGE = (
    *("passage", "document", "sentence2", "text", "question2", "hypothesis", "sent1", "text2", "passages", "documents"),
    *("doc", "docs", "context", "contexts", "retrieved_contexts", "abstract", "body", "content", "summary", "code"),
    *("chunk", "chunks", "ctxs", "evidence", "snippet", "snippets", "reference", "references", "paragraphs"),
)
POSITIVE = ("positive", "pos", "positives", "chosen", *PASSAGE, *ANSWER)
NEGATIVE = ("negative", "neg", "negatives", "hard_negatives", "rejected", "rejected_response", "neg_1")
# The query of a pair -> the other.
PAIRS = ("sentence1 sentence2", "question1 question2", "premise hypothesis", "sent0 sent1", "text1 text2")
PARTNER = dict(pair.split() for pair in PAIRS)
INSTRUCTION = ("prompt", "instruction", "query_instruction", "query_prompt", "task_instruction", "task_description")

_TEXTS = "(passage|doc|document|ctx|text|context|answer|response|sentence|message|sample)s?"
_IS_POSITIVE = re.compile(
    rf"(pos|positive|upvoted)s?(_{_TEXTS})?\d*|(relevant|gold|correct)_{_TEXTS}|chosen(_response)?"
)
_IS_NEGATIVE = re.compile(
    rf"(hard_?|bm25_?|mined_?|random_?|easy_?)?(neg|negative|rejected|downvoted|irrelevant|incorrect)s?(_{_TEXTS})?\d*"
    r"|distractors?\d*"
)
WEAK_QUERY = {"title", "instruction", "prompt"}  # often something else beside a query
LABEL_WORDS = {
    *("entailment", "not_entailment", "neutral", "contradiction", "supports", "refutes", "not enough info"),
    *("yes", "no", "true", "false", "relevant", "irrelevant", "not relevant", "positive", "negative"),
    *("duplicate", "not duplicate"),
}
SPLIT_WORDS = {"train", "training", "test", "dev", "validation", "valid", "val", "eval"}
LOOKED_AT = 1000  # rows whose values tell what a column holds


@dataclass
class Columns:
    """The columns to read; None: the usual name that the file has."""

    query: str | None = None
    positive: str | None = None
    negatives: list[str] | None = None
    label: str | None = None  # the column that tells whether the positive is one
    positive_above: float | None = None
    positive_labels: list[str] | None = None
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
    notes: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """Lines for the screen and the card."""
        also = {role: f" (also there: {', '.join(names)})" for role, names in self.also.items() if names}
        said = [f"{role} <- {' + '.join(names)}{also.get(role, '')}" for role, names in self.used.items() if names]
        line = (f"{self.shape}: " if self.shape else "") + ", ".join(said)
        line += f"; not read: {', '.join(self.unread)}" if self.unread else ""
        return [*filter(None, [line]), *(f"{count} {kind}" for kind, count in self.notes.items() if count)]


@dataclass
class Choice:
    """The columns by what they are. `flat`: columns that hold one [instruction, text] a row."""

    query: str
    positives: list[str]
    negatives: list[str]
    scores: dict[str, str]
    label: str | None = None
    split: str | None = None
    instruction: str | None = None
    flat: set[str] = field(default_factory=set)


def choose(source: str, sample: list[dict], columns: Columns, shape: Shape | None, reading: Reading) -> Choice:
    """Choose the columns of a source from some of its rows, and describe the choice in `reading`.

    Raises:
        UserError: a column is missing, could mean several things, holds ids, or is a label or a split of which nobody
            has said what it means.
    """
    names = {name: normal(name) for row in sample for name in row}
    values = {name: [row.get(name) for row in sample[:LOOKED_AT]] for name in names}
    uses = shape.made_of if shape else {}

    def asked(name: str, flag: str) -> str:
        found = [name] if name in names else [other for other, key in names.items() if key == normal(name)]
        if len(found) != 1:
            raise UserError(f"{source}: found the columns {', '.join(names)}; wanted a column {name!r} (--{flag})")
        return found[0]

    if columns.label is None and (columns.positive_above is not None or columns.positive_labels):
        raise UserError("--positive_above and --positive_labels need --label_column")
    label = asked(columns.label, "label_column") if columns.label else None
    ignored = {asked(name, "ignore_columns") for name in columns.ignore if name != "*"}
    taken = {*ignored, *re.findall(r"\w+", " ".join(uses.values())), label}
    empty = {name for name in names if not any(value not in (None, "", []) for value in values[name])}
    free = {name: key for name, key in names.items() if name not in {*taken, *empty}}
    queries = [name for key in QUERY for name in free if free[name] == key]
    query = asked(columns.query, "query_column") if columns.query else _first(queries, QUERY, "query", names, source)
    negatives = [asked(name, "negative_columns") for name in columns.negatives or ()] or [
        name for name, key in names.items() if _IS_NEGATIVE.fullmatch(key) and name not in {*taken, query}
    ]
    free = {name: key for name, key in free.items() if name not in {query, *negatives}}
    candidates = _candidates(free, names[query], values)
    if columns.positive:
        positives = [asked(columns.positive, "positive_column")]
    else:
        positives = _positives({name: free[name] for name in candidates}, names, values, source)
    taken |= {query, *positives, *negatives}
    words = {name: {str(value).casefold() for value in found if value is not None} for name, found in values.items()}
    texts = {name for name in names if any(isinstance(value, str) for value in values[name])}
    splits = [name for name in names if is_split(name) or (name in texts and words[name] <= SPLIT_WORDS)]
    labels = [name for name in names if is_label(name) or (name in texts and words[name] <= LABEL_WORDS)]
    split = next((name for name in splits if name not in taken), None) if columns.split else None
    if columns.split and not split:
        raise UserError(f"--split has no effect on {source}: found no column that names splits")
    instruction = next((n for key in INSTRUCTION for n in free if free[n] == key and n not in taken), None)
    if instruction and len(words[instruction]) > max(20, len(sample[:LOOKED_AT]) / 2):
        why = f"found {len(words[instruction])} different instructions in it; --ignore_columns {instruction}?"
        raise UserError(f"{source}: the column {instruction} would be each row's instruction, but {why}")
    scores = _score_columns(names, values)
    taken |= {split, instruction, *(name.partition(".")[0] for name in scores.values())}
    reading.shape = shape.name if shape else ""
    chosen: dict[str, list] = {"query": [query], "positive": positives, "negative": negatives}
    chosen |= {"instruction": [instruction], "label": [label], "split": [split], "scores": [*scores.values()]}
    reading.used = {role: [uses.get(n, n) for n in found if n] for role, found in chosen.items()}
    also = [name for name in candidates if name not in taken]
    also_queries = [n for n in queries if n not in {*taken, *also} and names[n] not in WEAK_QUERY]
    reading.also = {"query": also_queries, "positive": also}
    reading.unread = [n for n in names if n in ignored or n not in {*taken, *also, *also_queries}]
    for name in names if "*" not in columns.ignore else ():
        if name not in taken and (name in splits or name in labels):
            raise UserError(f"{source}: the column {name} {_unclear(name, values[name], name in splits)}")
    choice = Choice(query, positives, negatives, scores, label, split, instruction)
    for name in (query, *positives, *negatives):
        _check_texts(name, values, choice, columns, source)
    for role, found in reading.used.items():
        reading.used[role] = [f"{name} as [instruction, text]" if name in choice.flat else name for name in found]
    return choice


def _first(found: list[str], usual: tuple[str, ...], role: str, names: dict[str, str], source: str) -> str:
    if not found:
        header = " (--no_header, if the first line is a row)" if any(" " in name.strip() for name in names) else ""
        wanted = f"one of {', '.join(usual[:14])} for the {role} (--{role}_column)"
        raise UserError(f"{source}: found the columns {', '.join(names)}; wanted {wanted}, with texts{header}")
    return found[0]


def _candidates(free: dict[str, str], query: str, values: dict[str, list]) -> list[str]:
    """The columns that could be the positive, by preference, without those of true and false."""
    order = [*(key for key in free.values() if _IS_POSITIVE.fullmatch(key)), PARTNER.get(query, ""), *POSITIVE]
    found = dict.fromkeys(name for key in order for name in free if free[name] == key)
    return [name for name in found if not all(isinstance(value, bool | None) for value in values[name])]


def _positives(candidates: dict[str, str], names: dict[str, str], values: dict[str, list], source: str) -> list[str]:
    """The positive of the candidates. A name with "positive" comes first; others have to be of one kind."""
    named = [name for name, key in candidates.items() if _IS_POSITIVE.fullmatch(key)]
    if len(named) > 1 and all(candidates[name][-1].isdigit() for name in named):
        return named
    found = named or list(candidates)
    first = _first(found, POSITIVE, "positive", names, source)
    kinds = {(candidates[n] in ANSWER, any(isinstance(value, list) for value in values[n])) for n in found}
    if len(named) > 1 or (not named and len(kinds) > 1 and candidates[first] not in PARTNER.values()):
        either = " and ".join(found)
        raise UserError(f"{source}: each of the columns {either} could be the positive; say --positive_column {first}")
    return [first]


def _score_columns(names: dict[str, str], values: dict[str, list]) -> dict[str, str]:
    """Columns of scores in step with the positives and with the negatives."""
    columns = [(name, key) for name, key in names.items() if SCORES.fullmatch(key)]
    found = {"positive" if key.startswith("pos") else "negative": name for name, key in columns}
    of_mine = any(isinstance(value, dict) and {*value} == {"pos", "neg"} for value in values.get("scores", ()))
    return found or ({"positive": "scores.pos", "negative": "scores.neg"} if of_mine else {})


def _unclear(name: str, values: list, split: bool) -> str:
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    found = sorted({clip(item, 20) for item in items if item is not None})
    some = f"({', '.join(found[:5])}{', ...' if len(found) > 5 else ''})"
    if split:
        return f"{some} names splits; --split reads one of them, --ignore_columns {name} reads all"
    numbers = all(re.fullmatch(r"[-+.\de]+", value) for value in found)
    how = " --positive_above NUMBER or --positive_labels VALUE" if numbers else " --positive_labels WORD"
    how = " (1 is a positive)" if {*found} <= {"0", "1", "true", "false", "True", "False"} else how
    how = f"--label_column {name}{how}, or --ignore_columns {name} if it does not"
    return f"{some} seems to say which pairs are positive; say {how}"


def _check_texts(name: str, values: dict[str, list], choice: Choice, columns: Columns, source: str) -> None:
    """Refuse ids and numbers, and find out what lists of two texts are."""
    texts = texts_in(values[name])
    queries = texts_in(values[choice.query]) if name != choice.query else []
    kind = "" if columns.accept_numbers else looks_like_ids(normal(name), texts, queries)
    if kind:
        some = ", ".join(map(clip, texts[:3]))
        raise UserError(
            f"{source}: the column {name} holds {kind} ({some}) and no texts; name the column, or the file, that holds "
            "the texts of these ids (--accept_numbers takes them as texts)"
        )
    items = [item for value in values[name] if isinstance(value, list) for item in value if isinstance(item, dict)]
    inside = next((key for item in items for key in item if is_label(key)), None)
    if inside and name in choice.positives and not _IS_POSITIVE.fullmatch(normal(name)):
        raise UserError(
            f"{source}: the passages in {name} have a {inside} each, so not all of them are positives; write those "
            "that are as positive, the others as negative"
        )
    meaning = pairs_in(values[name])
    if meaning == "flat" or (meaning and name == choice.query):
        choice.flat.add(name)
    elif meaning:
        raise UserError(
            f"{source}: {name}: found the same text first in the list of every row; write [[instruction, text]], with "
            "a space at the end of the instruction, or take it out"
        )
