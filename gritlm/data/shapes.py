"""Public data sets whose rows are no plain columns of texts: a reader or a refusal for each, in one table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gritlm.data.cells import is_null
from gritlm.errors import UserError

FLAGS = ("is_selected", "is_relevant", "is_positive", "has_answer", "label", "relevance", "relevant", "score")

# ---- readers: a row becomes one or several rows of columns with usual names


def _array(row: list) -> dict:
    if len(row) not in (2, 3):
        raise UserError(f"found an array of {len(row)}, wanted [query, positive] or [query, positive, negative]")
    return dict(zip(("query", "positive", "negative"), row, strict=False))


def _set(row: dict) -> dict:
    if len(row["set"]) < 2:
        raise UserError("set: found fewer than 2 texts, wanted texts of one meaning")
    return row | {"query": row["set"][0], "positive": row["set"][1:]}


def _input_example(row: dict) -> dict:
    texts = row["texts"]
    return row | dict(zip(("query", "positive"), texts, strict=False)) | ({"negative": texts[2:]} if texts[2:] else {})


def _message(messages: Any) -> str:
    said = [message["content"] for message in messages if message["role"] != "system"]
    if len(said) != 1:
        raise UserError(f"found {len(said)} messages, wanted one: a conversation is no query and no passage")
    return said[0]


def _swift(row: dict) -> dict:
    texts = {side: [_message(m) for m in row.get(f"{side}_messages") or ()] for side in ("positive", "negative")}
    system = [message["content"] for message in row["messages"] if message["role"] == "system"]
    return row | texts | {"query": _message(row["messages"])} | ({"prompt": system[0]} if system else {})


def _alpaca(row: dict) -> dict:
    query = [row["instruction"], *(text for text in [row.get("input")] if not is_null(text))]
    return row | {"query": "\n".join(query), "positive": row["output"]}


def _llama_index(row: dict) -> list[dict]:
    found = {query: [row["corpus"][key] for key in keys] for query, keys in row["relevant_docs"].items()}
    return [{"query": row["queries"][query], "positive": texts} for query, texts in found.items()]


def _squad(row: dict) -> dict | list[dict]:
    if row["answers"] == [] or (isinstance(row["answers"], dict) and row["answers"].get("text") == []):
        return []  # SQuAD v2: the context does not answer the question
    return row | {"query": row["question"], "positive": row["context"]}


def _quora(row: dict) -> dict:
    return row | dict(zip(("query", "positive"), row["questions"]["text"], strict=True))


def _flagged(column: str) -> Callable[[dict], dict | list[dict]]:
    """Passages with a flag each that says whether it is a positive: lists side by side, or a list of objects."""

    def read(row: dict) -> dict | list[dict]:
        passages = row[column]
        if isinstance(passages, dict):
            passages = [dict(zip(passages, values, strict=True)) for values in zip(*passages.values(), strict=True)]
        if not passages:
            return []
        key = next(key for key in FLAGS if key in passages[0])
        if odd := [passage[key] for passage in passages if passage[key] not in (0, 1)]:
            raise UserError(f"{column}.{key}: found {odd[0]}, wanted 0 or 1")
        sides = {side: [p for p in passages if p[key] == flag] for side, flag in (("positive", 1), ("negative", 0))}
        return row | sides if sides["positive"] else []

    return read


# ---- the table


@dataclass(frozen=True)
class Shape:
    """Rows of one form.

    Attributes:
        name: the form's name in messages.
        columns: what its rows have. "a" a column, "a.b" an object or a list of objects with the key b, "a.[]" a list,
            "a|b" one of them, "-a" none of it.
        refuse: why it is not read, and what to do.
        read: gives a row as columns with usual names, or several such rows, or [] for none.
        uses: "query=a positive=b": the columns that those after `read` are made of.
    """

    name: str
    columns: str
    refuse: str = ""
    read: Callable[[Any], dict | list[dict]] | None = None
    uses: str = ""

    @property
    def made_of(self) -> dict[str, str]:
        return dict(part.split("=") for part in self.uses.split())

    def fits(self, row: dict) -> bool:
        return all(_has(word, row) for word in self.columns.split())


def _has(word: str, row: dict) -> bool:
    if word.startswith("-"):
        return not _has(word[1:], row)
    if "|" in word:
        return any(_has(part, row) for part in word.split("|"))
    column, _, key = word.partition(".")
    value = row.get(column)
    if key == "[]":
        return isinstance(value, list)
    value = value[0] if isinstance(value, list) and value else value
    return column in row and (not key or (isinstance(value, dict) and key in value))


Q = "query|question|anchor|claim|query_text|sentence1|question1|premise"
P = "positive|pos|positives|positive_passages|answer|answers|label|labels|score|prompt|instruction"
PAIR, PAIRS = '{"query": "...", "positive": "..."}', '{"query": "...", "positive": ["..."], "negative": ["..."]}'
IDS = "the passages are ids of a corpus in another file; give their texts, or a BEIR folder (corpus.jsonl, qrels/...)"
CHAT = f"conversations are not read; write each of the user's messages with the answer: {PAIR}"
NO_QUERIES = "no queries are found; training needs pairs (--query_column, --positive_column)"

ARRAYS = Shape("bare arrays", "", read=_array)
SHAPES = (
    Shape("sets of texts", "set.[] -positive|pos", "", _set, "query=set[0] positive=set[1:]"),
    Shape("InputExample", f"texts.[] -text|{Q}", "", _input_example, "query=texts[0] positive=texts[1]"
        " negative=texts[2:]"),
    Shape("ms-swift messages", "messages positive_messages", "", _swift, "query=messages positive=positive_messages"
        " negative=negative_messages"),
    Shape("alpaca", f"instruction output -{Q}", "", _alpaca, "query=instruction+input positive=output"),
    Shape("LlamaIndex", "queries corpus relevant_docs", "", _llama_index, "query=queries positive=corpus"),
    Shape("SQuAD", "question context answers.answer_start", "", _squad, "query=question positive=context"),
    Shape("Quora questions", "questions.text", "", _quora, "query=questions.text positive=questions.text"),
    *(
        Shape(f"{name} with flags", "|".join(f"{name}.{flag}" for flag in FLAGS), "", _flagged(name),
            f"positive={name} negative={name}")
        for name in ("passages", "documents", "candidates")
    ),
    Shape("a chat", f"messages -{Q}", CHAT),
    Shape("ShareGPT", f"conversations -{Q}", CHAT),
    Shape("Tevatron with ids", "positive_document_ids|positive_docids|positive_ids -positive|pos|positives", IDS),
    Shape("E5 with ids", "positives.doc_id", IDS),
    Shape("NeMo with a corpus", "corpus data -queries", IDS),
    Shape("NeMo with a corpus", "pos_doc.id -pos_doc.text", IDS),
    Shape("KILT", "output.provenance", IDS),
    Shape("relevance judgements", "query-id|query_id corpus-id|corpus_id", IDS),
    Shape("FEVER", "claim evidence -evidence.text -positive|pos|passage|text", f"the evidence is no text: {PAIR}"),
    Shape("Natural Questions", "annotations document", "HTML; hub:sentence-transformers/natural-questions is read"),
    Shape("HotpotQA", "context supporting_facts", f"write the articles of supporting_facts as the positives: {PAIRS}"),
    Shape("ELI5", "answers.score title -query|question", f"answers with votes; write those that you trust: {PAIRS}"),
    Shape("preferences of chats", "chosen.role", f"write the last messages of chosen and rejected: {PAIRS}"),
    Shape("preferences alone", f"chosen rejected -{Q}|prompt|instruction", f"write the prompt apart: {PAIRS}"),
    Shape("parallel sentences", f"translation -{Q}", f"write the two languages as two columns: {PAIR}"),
    Shape("a table by columns", "query.0|question.0", "in pandas: to_json(PATH, orient='records', lines=True)"),
    Shape("a corpus", f"text _id|id|docid -{Q}|{P}|document", f"{NO_QUERIES}; --query_column title takes the titles"),
    Shape("text only", f"text|content|sentence|document|passage -{Q}|{P}|title|summary", NO_QUERIES),
)  # fmt: skip


def find_shape(row: dict) -> Shape | None:
    """The first shape that fits a row; it has each column of a source, with its first value that is not empty."""
    return next((shape for shape in SHAPES if shape.fits(row)), None)
