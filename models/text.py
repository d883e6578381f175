"""A text with its instruction, and the contract by which texts become tokens. Needs neither torch nor transformers."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gritlm.errors import UserError
from gritlm.files import write_json

CONTRACT_FILE = "text_contract.json"


@dataclass
class TextContract:
    """How a text becomes tokens and a vector. Saved with the model as text_contract.json.

    The instruction is put directly before its text, and with `rstrip` the tokenizer drops the white space at the end of
    both. An instruction that ends in a space therefore has as many tokens alone as it has before a text, and a loader
    that counts the tokens of the instruction alone finds the text's first token.

    Attributes:
        query_max_len: limit in tokens for a query, its instruction included.
        passage_max_len: the same for a passage.
        pooling_method: mean, weightedmean, lasttoken or cls; see `gritlm.models.pooling`.
        normalized: divide each vector by its Euclidean norm.
        pool_instruction: include the instruction's tokens in pooling.
        append_eos: end each text with the end-of-text token; truncation keeps it.
        rstrip: drop white space at the end of a text, by the tokenizer's normalizer. llama.cpp runs no normalizer.
        prompts: instruction by name; "query" and "document" are the defaults for queries and passages.
    """

    query_max_len: int = 512
    passage_max_len: int = 512
    pooling_method: str = "mean"
    normalized: bool = True
    pool_instruction: bool = False
    append_eos: bool = False
    rstrip: bool = True
    prompts: dict[str, str] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """The limit of programs that have a single one for queries and passages."""
        return max(self.query_max_len, self.passage_max_len)

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / CONTRACT_FILE, asdict(self))

    @classmethod
    def load(cls, folder: str | Path) -> "TextContract":
        """Raises UserError."""
        path = Path(folder) / CONTRACT_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: found no text contract ({error}), wanted the one of a model folder") from error


class Text(NamedTuple):
    """A text and the instruction that is put directly before it ("" for none)."""

    instruction: str
    text: str


# ---- texts that a caller or a file gives

_ROW = '{"text": ...}, perhaps with "title"'


def titled(passage: object, where: str) -> str:
    """The text of a passage, with its title before it, joined by a space as in BEIR.

    Args:
        passage: a string, or a mapping with "text" and perhaps "title". Either may be None, but not both.
        where: the start of every message.
    Raises:
        UserError: it is something else, or not valid Unicode.
    """
    if isinstance(passage, str):
        return _string(passage, where)
    if not isinstance(passage, Mapping):
        raise UserError(f"{where}: found {_kind(passage)}, wanted a string or {_ROW}")
    if "text" not in passage:
        raise UserError(f"{where}: found the keys {list(passage)[:5]}, wanted {_ROW}")
    parts = {key: passage.get(key) for key in ("title", "text")}
    given = [_string(part, f"{where}: {key}") for key, part in parts.items() if part is not None]
    joined = " ".join(filter(None, given)).strip()
    if not joined and parts["text"] is None:
        raise UserError(f"{where}: text: found None and no title, wanted a string")
    return joined


def list_texts(texts: object) -> list[str]:
    """The strings of a list, tuple, array, Series or generator, in its order.

    Raises:
        UserError: it is another collection, or an item is not a string; the message names the item's index.
    """
    return [_string(text, f"texts[{i}]") for i, text in enumerate(_items(texts, "texts"))]


def list_passages(corpus: object) -> list[str]:
    """The passages of a corpus in its order, each with its title before it.

    The corpus is one of these; a passage is what `titled` takes:

        a list, tuple, array, Series or generator     each item is a passage
        {"title": "a", "text": "b"}                   one passage
        {"title": ["a", ...], "text": ["b", ...]}     columns, as in BEIR
        {id: {"title": "a", "text": "b"}, ...}        passages by id, as in BEIR

    Raises:
        UserError: it is something else, or has a bad passage; the message names its index or id.
    """
    if not isinstance(corpus, Mapping):
        return [titled(passage, f"corpus[{i}]") for i, passage in enumerate(_items(corpus, "corpus"))]
    text = corpus.get("text")
    if "text" not in corpus or isinstance(text, Mapping):
        return [_identified(passage, f"corpus[{key!r}]") for key, passage in corpus.items()]
    if text is None or isinstance(text, str):
        return [titled(corpus, "corpus")]
    texts = list(_items(text, "corpus['text']"))
    title = corpus.get("title")
    titles = [None] * len(texts) if title is None else list(_items(title, "corpus['title']"))
    if len(titles) != len(texts):
        raise UserError(f"corpus: found {len(titles)} titles and {len(texts)} texts, wanted a title for each text")
    rows = zip(titles, texts, strict=True)
    return [titled({"title": title, "text": text}, f"corpus[{i}]") for i, (title, text) in enumerate(rows)]


def _identified(passage: object, where: str) -> str:
    # Strings are refused: the fields of one passage look like strings by id.
    if not isinstance(passage, Mapping):
        raise UserError(f"{where}: found {_kind(passage)}, wanted {_ROW}")
    return titled(passage, where)


def _items(texts: Any, where: str) -> Iterable[object]:
    # Mappings and data frames iterate over their keys; a row of a data frame over its title, its text, and the rest.
    one_row = "text" in getattr(texts, "keys", tuple)()
    if not (isinstance(texts, (str, bytes, Mapping)) or hasattr(texts, "columns") or one_row):
        try:
            return iter(texts)
        except TypeError:  # not iterable
            pass
    hint = '(of {id: text} its values, of a DataFrame one column or to_dict("records"))'
    raise UserError(f"{where}: found {_kind(texts)}, wanted a string or a list {hint}")


def _string(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where}: found {_kind(text)}, wanted a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: found half of a surrogate pair, wanted valid Unicode") from error
    return text


def _kind(value: object) -> str:
    return repr(value) if value is None or isinstance(value, float) else type(value).__name__
