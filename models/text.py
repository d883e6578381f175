"""A text with its instruction, and the contract of how texts become tokens. Needs neither torch nor transformers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

CONTRACT_FILE = "text_contract.json"


@dataclass
class TextContract:
    """How a text becomes tokens, and which of them are pooled. Saved with the model as text_contract.json.

    An instruction is put before its text as it stands. Trailing white space of the whole is dropped by the tokenizer:
    an instruction that ends in a space then has as many tokens alone as before a text, so what stands behind it is
    pooled from its first token on, by any loader that measures the instruction alone.
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
    """What is encoded: the instruction stands right before the text."""

    instruction: str
    text: str


def titled(passage: Mapping[str, str]) -> str:
    """Title and text as one, as in BEIR."""
    return f"{passage.get('title') or ''} {passage['text']}".strip()
