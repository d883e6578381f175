"""A text with its instruction, and the contract by which texts become tokens. Needs neither torch nor transformers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

CONTRACT_FILE = "text_contract.json"


@dataclass
class TextContract:
    """How a text becomes tokens and a vector. Saved with the model as text_contract.json.

    The instruction is put directly before its text, and the tokenizer drops the white space at the end of both. An
    instruction that ends in a space therefore has as many tokens alone as it has before a text, and a loader that
    counts the tokens of the instruction alone finds the text's first token.

    Attributes:
        query_max_len: limit in tokens for a query, its instruction included.
        passage_max_len: the same for a passage.
        pooling_method: mean, weightedmean, lasttoken or cls; see `gritlm.models.pooling`.
        normalized: divide each vector by its Euclidean norm.
        pool_instruction: include the instruction's tokens in pooling.
        append_eos: end each text with the end-of-text token; truncation keeps it.
        prompts: instruction by name; "query" and "document" are the defaults for queries and passages.
    """

    query_max_len: int = 512
    passage_max_len: int = 512
    pooling_method: str = "mean"
    normalized: bool = True
    pool_instruction: bool = False
    append_eos: bool = False
    prompts: dict[str, str] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        (Path(folder) / CONTRACT_FILE).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "TextContract":
        return cls(**json.loads((Path(folder) / CONTRACT_FILE).read_text()))


class Text(NamedTuple):
    """A text and the instruction that is put directly before it ("" for none)."""

    instruction: str
    text: str


def titled(passage: Mapping[str, str]) -> str:
    """A passage's title and text, joined by a space as in BEIR."""
    return f"{passage.get('title') or ''} {passage['text']}".strip()
