"""Which column of a source is the query, which are its positives, its negatives, its label; told by usual names."""

import re
from collections import Counter
from dataclasses import dataclass, field

from gritlm.data.cells import ID_NAME, NUMBER, as_list, clip, is_null, looks_like_ids, pairs_in, texts_in
from gritlm.data.shapes import FLAGS, SCORES, Shape, is_label, is_split, normal
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
    rf"|(wrong|bad|false)_{_TEXTS}\d*|(distractor|hn)s?\d*"
)
WEAK_QUERY = {"title", "instruction", "prompt"}  # often something else beside a query
LABEL_WORDS = {
    *("entailment", "not_entailment", "neutral", "contradiction", "supports", "refutes", "not enough info"),
    *("yes", "no", "true", "false", "relevant", "irrelevant", "not relevant", "positive", "negative"),
    *("duplicate", "not duplicate", "pos", "neg", "accepted", "rejected", "approved", "partially relevant"),
    *("highly relevant", "somewhat relevant", "submitted", "discarded"),
    *("not_relevant", "correct", "incorrect", "supported", "refuted", "exact", "substitute", "complement"),
}
# Of a label only where two of one group are there.
TWO_OF = (
    *({"0", "1"}, {"-1", "1"}, {"-1", "0", "1"}, {"true", "false"}, {"y", "n"}, {"t", "f"}, {"e", "s", "c", "i"}),
    *({"ja", "nein"}, {"oui", "non"}, {"sí", "si", "no"}, {"да", "нет"}, {"是", "否"}, {"はい", "いいえ"}),
)
SPLIT_WORDS = {"train", "training", "test", "dev", "validation", "valid", "val", "eval"}
SPLIT_WORD = re.compile(rf"({'|'.join(sorted(SPLIT_WORDS))})([\W\d_].*)?")
HAS_LISTS = re.compile(r"\.(jsonl|ndjson|json|parquet)(\.\w+)?$", re.IGNORECASE)
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
    doubtful: dict[str, str] = field(default_factory=dict)  # unread column -> its values, few or small numbers
    notes: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """Lines for the screen and the card."""
        also = {role: f" (also there: {', '.join(names)})" for role, names in self.also.items() if names}
        said = [f"{role} <- {' + '.join(names)}{also.get(role, '')}" for role, names in self.used.items() if names]
        line = (f"{self.shape}: " if self.shape else "") + ", ".join(said)
        unread = [f"{n} ({self.doubtful[n]}: a label?)" if n in self.doubtful else n for n in self.unread]
        line += f"; not read: {', '.join(unread)}" if unread else ""
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
    unclear: list[str] = field(default_factory=list)  # unread columns that nobody has named
    decode: bool = True  # lists written as text are decoded; JSON and parquet have lists of their own


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
    words = {name: _words(found) for name, found in values.items()}
    splits = [name for name in names if is_split(name) or _of_splits(words[name])]
    numbering = {n for n in names if [*map(str, values[n])] == ["0", "1"]}  # of two rows
    labels = [n for n in names if is_label(n) or _of_labels(values[n]) or _in_step(n, values, positives)]
    labels = [n for n in labels if is_label(n) or n not in numbering]
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
    reading.doubtful = {n: _some(values[n]) for n in reading.unread if n not in ignored and _doubtful(n, values[n])}
    unclear = [name for name in names if name not in taken and "*" not in columns.ignore]
    for name in unclear:
        if name in splits or name in labels:
            raise UserError(f"{source}: the column {name} {_unclear(name, values[name], name in splits)}")
    decode = not HAS_LISTS.search(source)
    choice = Choice(query, positives, negatives, scores, label, split, instruction, decode=decode, unclear=unclear)
    for name in (query, *positives, *negatives):
        _check_texts(name, values, choice, columns, source)
    for role, found in reading.used.items():
        reading.used[role] = [f"{name} as [instruction, text]" if name in choice.flat else name for name in found]
    return choice


def check_late_values(source: str, seen: dict[str, dict[object, None]]) -> None:
    """Refuse a source whose unread columns turn out to be labels or splits in the rows after `LOOKED_AT`.

    Args:
        seen: the first different values of each column, over all rows.
    """
    for name, values in seen.items():
        split = _of_splits(_words([*values]))
        if split or _of_labels([*values]):
            raise UserError(f"{source}: the column {name} {_unclear(name, [*values], split)}")


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
    found, some = _shown(values), f"({_some(values)})"
    if split:
        return f"{some} names splits; --split reads one of them, --ignore_columns {name} reads all"
    numbers = all(re.fullmatch(r"[-+.\de]+", value) for value in found)
    how = " --positive_above NUMBER or --positive_labels VALUE" if numbers else " --positive_labels WORD"
    how = " (1 is a positive)" if {*found} <= {"0", "1", "true", "false", "True", "False"} else how
    how = f"--label_column {name}{how}, or --ignore_columns {name} if it does not"
    return f"{some} seems to say which pairs are positive; say {how}"


def _shown(values: list) -> list[str]:
    """The different values of a column and of lists in it, as messages show them."""
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return sorted({clip(item, 20) for item in items if not is_null(item) and str(item).strip()})


def _some(values: list) -> str:
    found = _shown(values)
    return ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")


def _doubtful(name: str, values: list) -> bool:
    """Whether an unread column may be a label under an unusual name: few values that repeat, or fractions."""
    words = _words(values)
    if ID_NAME.fullmatch(normal(name)) or any(len(word) > 30 for word in words):
        return False
    if all(map(NUMBER.fullmatch, words)) and any("." in word for word in words):
        return True
    return 1 < len(words) <= min(10, sum(not is_null(value) for value in values) / 2)


def _words(values: list) -> set[str]:
    """The different values in lower case, 1.0 as 1, without empty cells."""
    found = (int(v) if isinstance(v, float) and v.is_integer() else v for v in values if not is_null(v))
    return {str(value).strip().casefold() for value in found} - {""}


def _of_splits(words: set[str]) -> bool:
    return bool(words) and (all(map(SPLIT_WORD.fullmatch, words)) or words == {"public", "private"})  # of Kaggle


def _of_labels(values: list) -> bool:
    """Whether a column's values are those of a label."""
    words = _words(values)
    if words and words <= LABEL_WORDS and any(isinstance(value, str) for value in values):
        return True
    return len(words) > 1 and any(words <= group for group in TWO_OF)


def _in_step(name: str, values: dict[str, list], positives: list[str]) -> bool:
    """Whether each row has a list of numbers as long as that of its positives: a rating of each."""
    if len(positives) != 1 or name in positives or ID_NAME.fullmatch(normal(name)):
        return False
    rows = [(v, p) for v, p in zip(values[name], values[positives[0]], strict=True) if isinstance(v, list) and v]
    if not all(isinstance(p, list) and len(p) == len(v) for v, p in rows) or not any(len(v) > 1 for v, _ in rows):
        return False
    return all(isinstance(item, int | float) for v, _ in rows for item in v)


def _wrong_texts(name: str, texts: list[str], choice: Choice, columns: Columns) -> str:
    """What a column that nobody has named holds instead of texts: words of labels, of splits, letters, or ""."""
    if name in (columns.query, columns.positive) or name in (columns.negatives or ()) or not texts:
        return ""
    words = _words(texts)
    if _of_splits(words):
        return "names of splits"
    if words <= LABEL_WORDS:
        return "words of labels"
    if name in choice.positives and all(re.fullmatch("[A-Z]", text) for text in texts):
        return "single letters"
    few = name in choice.negatives and len(texts) >= 50 and len(words) <= 5
    same = (
        name in choice.negatives and len(words) > 1 and len({text[:16] for text in texts}) == 1 and len(texts[0]) > 16
    )
    return "nearly the same in all rows" if few or same else ""


def _check_texts(name: str, values: dict[str, list], choice: Choice, columns: Columns, source: str) -> None:
    """Refuse ids and numbers, and find out what lists of two texts are."""
    texts = texts_in(values[name])
    others = choice.query if name != choice.query else choice.positives[0]
    queries = (
        [] if name == choice.query and {*values} != {"query", "positive", "negative"} else texts_in(values[others])
    )
    kind = "" if columns.accept_numbers else looks_like_ids(normal(name), texts, queries)
    if kind:
        some = ", ".join(map(clip, texts[:3]))
        raise UserError(
            f"{source}: the column {name} holds {kind} ({some}) and no texts; name the column, or the file, that holds "
            "the texts of these ids (--accept_numbers takes them as texts)"
        )
    if wrong := _wrong_texts(name, texts, choice, columns):
        some = ", ".join(map(clip, dict.fromkeys(texts[:5])))
        raise UserError(
            f"{source}: the column {name} holds {wrong} ({some}) and no texts; name the columns that hold the texts "
            "(--query_column, --positive_column, --negative_columns)"
        )
    inside = _flag_inside(values[name], is_named=bool(_IS_POSITIVE.fullmatch(normal(name))))
    if inside and name in choice.positives:
        raise UserError(
            f"{source}: the passages in {name} have a {inside} each, so not all of them are positives; write those "
            "that are as positive, the others as negative"
        )
    meaning = pairs_in(values[name])
    if meaning == "mixed" and choice.query in choice.flat:
        meaning = "flat"
    if meaning == "flat" or (meaning and name == choice.query):
        choice.flat.add(name)
    elif meaning == "mixed":
        raise UserError(
            f"{source}: {name}: found lists of two texts of which some could be [instruction, text] and others two "
            "texts; write [[instruction, text]] for the first, and take white space off the ends of the others"
        )
    elif meaning:
        raise UserError(
            f"{source}: {name}: found the same text first in the list of every row; write [[instruction, text]], with "
            "a space at the end of the instruction, or take it out"
        )


def _flag_inside(values: list, is_named: bool) -> str | None:
    """The key of passages that tells which are positives; `is_named` as positives, it has to deny that one is."""
    rows: list[list[dict]] = []
    for value in values:
        try:
            items = [item for item in as_list(value) if isinstance(item, dict)]
        except UserError:
            continue
        rows.append(items)
        for key, flag in ((key, flag) for item in items for key, flag in item.items()):
            found = is_label(key) or (key == "type" and str(flag).casefold() in LABEL_WORDS)
            denies = flag in (0, False) if normal(key) in FLAGS and key != "score" else False
            if found and (denies or not is_named):
                return key
    for key in {key for items in rows for item in items for key in item} if not is_named else ():
        flags = [[item.get(key) for item in items] for items in rows]
        numbering = all(
            given == [*range(given[0], given[0] + len(given))] for given in flags if given and type(given[0]) is int
        )
        if _of_labels([flag for given in flags for flag in given]) and not numbering:
            return key
    return None
