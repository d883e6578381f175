"""Which columns are a label, that says how good a pair is, or name a split: told by their names and their values."""

import re
from collections import Counter

from gritlm.data.cells import ID_NAME, NUMBER, clip, is_null

_LABEL = (
    "labels?|lab|gold|scores?|similarity|sim|similar|relevance|relevancy|relevant|rel|duplicates?|rating|grade|correct|"
    "judge?ments?|quality|class|verdict|stance|prob|probability|match|paraphrase|equivalent|has_answer|supporting"
)
LABEL = re.compile(
    rf"({_LABEL})(_(score|label|text|name|value|class|id|responses?|suggestion)|\d+)?|\w+_({_LABEL})|is_\w+"
    r"|is(duplicate|relevant)|target|y|outcome|(up|down)?_?votes?|cosine|relatedness|click(s|ed)?|accepted|helpful"
    r"|preferred|entail(s|ed)|answerable|(gold|correct|positive|answer)_(index|idx)|ranking"
)
SPLIT = re.compile(r"(\w+_)?splits?|fold|partition|(data|dataset)_set|set_name")
SCORES = re.compile(r"(pos|neg)(itive|ative)?s?_scores?")
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
SPLIT_WORD = re.compile(r"(dev|eval|test|train|training|val|valid|validation)([\W\d_].*)?")


def normal(name: object) -> str:
    """A column's name without case, spaces, hyphens, and underscores before digits: "Hard-Neg_1" -> "hard_neg1"."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name).strip())
    return re.sub(r"_(?=\d)", "", re.sub(r"[\s\-.]+", "_", words)).casefold()


def is_label(name: str) -> bool:
    """Whether a column seems to say how good a pair is. Scores beside positives and negatives do not."""
    return bool(LABEL.fullmatch(normal(name))) and not SCORES.fullmatch(normal(name))


def is_split(name: str) -> bool:
    return bool(SPLIT.fullmatch(normal(name)))


def unread_notes(keys: Counter[str]) -> tuple[list[str], list[str]]:
    """The unread keys of training rows, most frequent first, and those of them that seem to be a label or a split.

    "scores" is what `gritlm mine --output_scores` writes.
    """
    names = [name for name, _ in keys.most_common()]
    return names, [name for name in names if name != "scores" and (is_label(name) or is_split(name))]


# ---- values


def words_of(values: list) -> set[str]:
    """The different values in lower case, 1.0 as 1, without empty cells."""
    found = (int(v) if isinstance(v, float) and v.is_integer() else v for v in values if not is_null(v))
    return {str(value).strip().casefold() for value in found} - {""}


def name_splits(values: list) -> bool:
    words = words_of(values)
    return bool(words) and (all(map(SPLIT_WORD.fullmatch, words)) or words == {"public", "private"})  # of Kaggle


def are_labels(values: list) -> bool:
    words = words_of(values)
    if words and words <= LABEL_WORDS and any(isinstance(value, str) for value in values):
        return True
    return len(words) > 1 and any(words <= group for group in TWO_OF)


def may_be_labels(name: str, values: list) -> bool:
    """Whether an unread column may be a label under an unusual name: few values that repeat, or fractions."""
    words = words_of(values)
    if ID_NAME.fullmatch(normal(name)) or any(len(word) > 30 for word in words):
        return False
    if all(map(NUMBER.fullmatch, words)) and any("." in word for word in words):
        return True
    return 1 < len(words) <= min(10, sum(not is_null(value) for value in values) / 2)


def why_unclear(name: str, values: list, split: bool) -> str:
    """What to say of a column that names splits or seems to be a label, and what to do about it."""
    found, some = _shown(values), f"the column {name} ({some_of(values)})"
    if split:
        return f"{some} names splits; --split reads one of them, --ignore_columns {name} reads all"
    numbers = all(re.fullmatch(r"[-+.\de]+", value) for value in found)
    how = " --positive_above NUMBER or --positive_labels VALUE" if numbers else " --positive_labels WORD"
    keep = f", --score_column {name} to train on the numbers" if numbers else ""
    how = " (1 is a positive)" if {*found} <= {"0", "1", "true", "false", "True", "False"} else how
    how = f"--label_column {name}{how}{keep}, or --ignore_columns {name} if it does not"
    return f"{some} seems to say which pairs are positive; say {how}"


def some_of(values: list) -> str:
    """Some of the different values of a column, and of lists in it."""
    found = _shown(values)
    return ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")


def _shown(values: list) -> list[str]:
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return sorted({clip(item, 20) for item in items if not is_null(item) and str(item).strip()})
