"""Which column of a source is the query, which are its positives, its negatives, its label; told by usual names."""

import re
from dataclasses import dataclass, field

from gritlm.data import labels
from gritlm.data.cells import ID_NAME, clip, lists_in, looks_like_ids, pairs_in, texts_in
from gritlm.data.raw import Columns, Reading
from gritlm.data.shapes import FLAGS, Shape
from gritlm.errors import UserError

# Usual column names in normal form (`labels.normal`), by preference.
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
    rf"|(wrong|bad|false)_{_TEXTS}\d*|(distractor|hn)s?\d*"
)
WEAK_QUERY = {"title", "instruction", "prompt"}  # often something else beside a query
HAS_LISTS = re.compile(r"\.(jsonl|ndjson|json|parquet)(\.\w+)?$", re.IGNORECASE)
LOOKED_AT = 1000  # rows whose values tell what a column holds


@dataclass
class Choice:
    """The columns by what they are."""

    query: str
    positives: list[str]
    negatives: list[str]
    scores: dict[str, str]  # "positive", "negative" -> column
    label: str | None
    split: str | None
    instruction: str | None
    score: str | None
    unclear: list[str]  # unread columns that nobody has named
    decode: bool  # lists written as text are decoded; JSON and parquet have lists of their own
    flat: set[str] = field(default_factory=set)  # columns that hold one [instruction, text] a row


class _Table:
    """Some rows of a source, by their columns."""

    def __init__(self, source: str, sample: list[dict]):
        self.source = source
        self.keys = {name: labels.normal(name) for row in sample for name in row}
        self.values = {name: [row.get(name) for row in sample[:LOOKED_AT]] for name in self.keys}

    def asked(self, names: list[str] | list[str | None], flag: str) -> list[str]:
        """The columns that a flag names, whatever their case; none for None."""
        return [self._asked(name, flag) for name in names if name]

    def _asked(self, name: str, flag: str) -> str:
        found = [name] if name in self.keys else self.with_keys([labels.normal(name)])
        if len(found) != 1:
            raise self.error(f"found the columns {', '.join(self.keys)}; wanted a column {name!r} (--{flag})")
        return found[0]

    def with_keys(self, keys: tuple[str, ...] | list[str]) -> list[str]:
        """The columns with these names in normal form, in this order."""
        return list(dict.fromkeys(name for key in keys for name in self.keys if self.keys[name] == key))

    def error(self, what: str) -> UserError:
        return UserError(f"{self.source}: {what}")

    def nothing(self, role: str, usual: tuple[str, ...]) -> UserError:
        header = " (--no_header, if the first line is a row)" if any(" " in name.strip() for name in self.keys) else ""
        wanted = f"one of {', '.join(usual[:14])} for the {role} (--{role}_column)"
        return self.error(f"found the columns {', '.join(self.keys)}; wanted {wanted}, with texts{header}")


def choose(source: str, sample: list[dict], columns: Columns, shape: Shape | None, reading: Reading) -> Choice:
    """Choose the columns of a source from some of its rows, and describe the choice in `reading`.

    Raises:
        UserError: a column is missing, could mean several things, holds ids, or is a label or a split of which nobody
            has said what it means.
    """
    if columns.label is None and (columns.positive_above is not None or columns.positive_labels):
        raise UserError("--positive_above and --positive_labels need --label_column")
    table = _Table(source, sample)
    uses = shape.made_of if shape else {}
    label, score = table.asked([columns.label], "label_column"), table.asked([columns.score], "score_column")
    ignored = table.asked([name for name in columns.ignore if name != "*"], "ignore_columns")
    taken = {*ignored, *re.findall(r"\w+", " ".join(uses.values())), *label, *score}
    empty = {name for name, values in table.values.items() if not any(value not in (None, "", []) for value in values)}
    queries = [name for name in table.with_keys(QUERY) if name not in {*taken, *empty}]
    query = table.asked([columns.query], "query_column") or queries[:1]
    if not query:
        raise table.nothing("query", QUERY)
    negatives = table.asked(columns.negatives or [], "negative_columns") or [
        name for name, key in table.keys.items() if _IS_NEGATIVE.fullmatch(key) and name not in {*taken, *query}
    ]
    candidates = _candidates(table, query[0], {*taken, *empty, *query, *negatives})
    positives = table.asked([columns.positive], "positive_column") or _positives(table, candidates)
    taken |= {*query, *positives, *negatives}
    splits = [name for name, values in table.values.items() if labels.is_split(name) or labels.name_splits(values)]
    split = [name for name in splits if name not in taken][:1] if columns.split else []
    if columns.split and not split:
        raise UserError(f"--split has no effect on {source}: found no column that names splits")
    instruction = _instruction(table, {*taken, *empty})
    scores = _score_columns(table, taken)
    taken |= {*split, *instruction, *(name.partition(".")[0] for name in scores.values())}
    unclear = [name for name in table.keys if name not in taken and "*" not in columns.ignore]
    for name in unclear:
        if name in splits or _tells_positives(table, name, positives):
            raise table.error(labels.why_unclear(name, table.values[name], name in splits))
    is_json = bool(HAS_LISTS.search(source))
    roles = _one(label), _one(split), _one(instruction), _one(score)
    choice = Choice(query[0], positives, negatives, scores, *roles, unclear, decode=not is_json)
    for name in (*query, *positives, *negatives):
        _check_texts(table, name, choice, columns)
    also = [name for name in candidates if name not in taken]
    also_queries = [n for n in queries if n not in {*taken, *also} and table.keys[n] not in WEAK_QUERY]
    used = {"query": query, "positive": positives, "negative": negatives, "instruction": instruction, "label": label}
    used |= {"split": split, "scores": [*scores.values()], "score": score}
    reading.shape = shape.name if shape else ""
    reading.used = {role: [_described(uses.get(n, n), choice) for n in found] for role, found in used.items()}
    reading.also = {"query": also_queries, "positive": also}
    reading.unread = [n for n in table.keys if n in ignored or n not in {*taken, *also, *also_queries}]
    doubtful = [n for n in reading.unread if n not in ignored and labels.may_be_labels(n, table.values[n])]
    reading.doubtful = {n: labels.some_of(table.values[n]) for n in doubtful}
    return choice


def check_late_values(source: str, seen: dict[str, dict[object, None]]) -> None:
    """Refuse a source whose unread columns turn out to be labels or splits in the rows after `LOOKED_AT`.

    Args:
        seen: the first different values of each column, over all rows.
    """
    for name, values in seen.items():
        split = labels.name_splits([*values])
        if split or labels.are_labels([*values]):
            raise UserError(f"{source}: {labels.why_unclear(name, [*values], split)}")


def _one(names: list[str]) -> str | None:
    return names[0] if names else None


def _described(name: str, choice: Choice) -> str:
    return f"{name} as [instruction, text]" if name in choice.flat else name


def _candidates(table: _Table, query: str, taken: set[str]) -> list[str]:
    """The columns that could be the positive, by preference, without those of true and false."""
    named = [key for key in table.keys.values() if _IS_POSITIVE.fullmatch(key)]
    found = table.with_keys([*named, PARTNER.get(table.keys[query], ""), *POSITIVE])
    flags = {name for name in found if all(isinstance(value, bool | None) for value in table.values[name])}
    return [name for name in found if name not in taken | flags]


def _positives(table: _Table, candidates: list[str]) -> list[str]:
    """The positive of the candidates. A name with "positive" comes first; others have to be of one kind."""
    named = [name for name in candidates if _IS_POSITIVE.fullmatch(table.keys[name])]
    if len(named) > 1 and all(table.keys[name][-1].isdigit() for name in named):
        return named
    found = named or candidates
    if not found:
        raise table.nothing("positive", POSITIVE)
    kinds = {(table.keys[n] in ANSWER, any(isinstance(value, list) for value in table.values[n])) for n in found}
    if len(named) > 1 or (not named and len(kinds) > 1 and table.keys[found[0]] not in PARTNER.values()):
        either = " and ".join(found)
        raise table.error(f"each of the columns {either} could be the positive; say --positive_column {found[0]}")
    return found[:1]


def _instruction(table: _Table, taken: set[str]) -> list[str]:
    """The column of each row's instruction; it has to repeat itself."""
    found = [name for name in table.with_keys(INSTRUCTION) if name not in taken][:1]
    for name in found:
        if (count := len(labels.words_of(table.values[name]))) > max(20, len(table.values[name]) / 2):
            why = f"found {count} different instructions in it; --ignore_columns {name}?"
            raise table.error(f"the column {name} would be each row's instruction, but {why}")
    return found


def _score_columns(table: _Table, taken: set[str]) -> dict[str, str]:
    """Columns of scores in step with the positives and with the negatives."""
    columns = [(name, key) for name, key in table.keys.items() if labels.SCORES.fullmatch(key) and name not in taken]
    found = {"positive" if key.startswith("pos") else "negative": name for name, key in columns}
    mine = table.values.get("scores", ()) if "scores" not in taken else ()
    of_mine = any(isinstance(value, dict) and {*value} == {"pos", "neg"} for value in mine)
    return found or ({"positive": "scores.pos", "negative": "scores.neg"} if of_mine else {})


# ---- what columns hold


def _tells_positives(table: _Table, name: str, positives: list[str]) -> bool:
    """Whether a column seems to be a label: by its name, its values, or lists of ratings in step with the positives."""
    values = table.values[name]
    numbering = [*map(str, values)] == ["0", "1"]  # of two rows
    if labels.is_label(name) or (labels.are_labels(values) and not numbering):
        return True
    if len(positives) != 1 or name in positives or ID_NAME.fullmatch(table.keys[name]):
        return False
    rows = [(v, p) for v, p in zip(values, table.values[positives[0]], strict=True) if isinstance(v, list) and v]
    if not all(isinstance(p, list) and len(p) == len(v) for v, p in rows) or not any(len(v) > 1 for v, _ in rows):
        return False
    return all(isinstance(item, int | float) for v, _ in rows for item in v)


def _check_texts(table: _Table, name: str, choice: Choice, columns: Columns) -> None:
    """Refuse a column without texts, and find out what lists of two texts are."""
    values, is_query = table.values[name], name == choice.query
    texts, advice = texts_in(values), "name the column, or the file, that holds the texts of these ids"
    of_array = {*table.keys} == {"query", "positive", "negative"}
    beside = table.values[choice.positives[0] if is_query else choice.query]
    others = [] if is_query and not of_array else texts_in(beside)
    found = "" if columns.accept_numbers else looks_like_ids(table.keys[name], texts, others)
    advice += " (--accept_numbers takes them as texts)"
    if not found and name not in (columns.query, columns.positive, *(columns.negatives or ())):
        found = _wrong_texts(texts, name in choice.positives, name in choice.negatives)
        advice = "name the columns that hold the texts (--query_column, --positive_column, --negative_columns)"
    if found:
        some = ", ".join([clip(text) for text in dict.fromkeys(texts)][:3])
        raise table.error(f"the column {name} holds {found} ({some}) and no texts; {advice}")
    if name in choice.positives and (flag := _flag_inside(values, bool(_IS_POSITIVE.fullmatch(table.keys[name])))):
        raise table.error(
            f"the passages in {name} have the field {flag}, so not all of them are positives; write those that are as "
            "positive, the others as negative"
        )
    meaning = pairs_in(values)
    if meaning == "flat" or (meaning and is_query) or (meaning == "mixed" and choice.query in choice.flat):
        choice.flat.add(name)
    elif meaning == "mixed":
        raise table.error(
            f"{name}: found lists of two texts of which some could be [instruction, text] and others two texts; write "
            "[[instruction, text]] for the first, and take white space off the ends of the others"
        )
    elif meaning:
        raise table.error(
            f"{name}: found the same text first in the list of every row; write [[instruction, text]], with a space at "
            "the end of the instruction, or take it out"
        )


def _wrong_texts(texts: list[str], is_positive: bool, is_negative: bool) -> str:
    """What a column holds instead of texts: words of labels, names of splits, single letters, or ""."""
    words = labels.words_of(texts)
    if labels.name_splits(texts):
        return "names of splits"
    if words and words <= labels.LABEL_WORDS:
        return "words of labels"
    if is_positive and texts and all(re.fullmatch("[A-Z]", text) for text in texts):
        return "single letters"
    few = len(texts) >= 50 and len(words) <= 5
    same = len(words) > 1 and len({text[:16] for text in texts}) == 1 and len(texts[0]) > 16
    return "nearly the same in all rows" if is_negative and (few or same) else ""


def _flag_inside(values: list, is_named: bool) -> str | None:
    """The key of passages that tells which are positives; `is_named` as positives, it has to deny that one is."""
    flags: dict[str, list[list]] = {}  # key -> its values, row by row
    for cell in lists_in(values):
        items = [item for item in cell if isinstance(item, dict)]
        for key in dict.fromkeys(key for item in items for key in item):
            flags.setdefault(key, []).append([item[key] for item in items if key in item])
    for key, given in flags.items():
        found = [flag for row in given for flag in row]
        words = labels.words_of(found) if key == "type" else set()
        known = labels.is_label(key) or words & labels.LABEL_WORDS
        denies = labels.normal(key) in FLAGS and key != "score" and any(flag in (0, False) for flag in found)
        numbering = all(type(row[0]) is int and row == [*range(row[0], row[0] + len(row))] for row in given)
        if denies if is_named else known or (labels.are_labels(found) and not numbering):
            return key
    return None
