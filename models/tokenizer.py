"""Texts to token ids under a contract, which lives in the saved tokenizer wherever it can."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gritlm.errors import UserError
from gritlm.models.text import Text, TextContract

STRETCH = 512  # texts tokenised at once
BOUNDARY_PROBES = ("a", "A", "1", "(", ".", "é", "中", '"')


def load_tokenizer(name_or_path: str, contract: TextContract, trust_remote_code: bool = False):
    """The model's fast tokenizer with the contract put into it: right padding, trailing space dropped, end token.

    Raises:
        UserError: there is no fast tokenizer, or no end-of-text token where one is needed.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name_or_path}: no tokenizer there: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{name_or_path}: found a slow tokenizer, wanted a fast one (tokenizer.json)")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"{name_or_path}: found a tokenizer without pad and end-of-text tokens, wanted one")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    backend = tokenizer.backend_tokenizer
    if "strip_right=True" not in repr(backend.normalizer):
        steps = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Strip(left=False, right=True)])
    if contract.append_eos and tokenizer("a").input_ids[-1] != tokenizer.eos_token_id:
        if tokenizer.eos_token is None:
            raise UserError(f"--append_eos: {name_or_path} has no end-of-text token")
        end = processors.TemplateProcessing(
            single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
        )
        backend.post_processor = (
            processors.Sequence([backend.post_processor, end]) if backend.post_processor is not None else end
        )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save under the generic class: a model's own class would rebuild its normalizer and lose the contract."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


@dataclass
class Tokens:
    """One text: its token ids, and how many of the first ones belong to the instruction."""

    ids: list[int]
    prompt_length: int


class TextTokenizer:
    """Texts to token ids under a contract. Holds no model.

    Every text gets at least one token, and at least one that is pooled: an empty one stands as a full stop, one that is
    nothing but its instruction pools the instruction.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, contract: TextContract):
        self.tokenizer, self.contract = tokenizer, contract
        self._prompt_lengths: dict[str, int] = {}

    def __call__(self, texts: Sequence[Text], max_length: int) -> list[Tokens]:
        # A stretch at a time: the tokenizer keeps what it cut off until it has done all that it was given.
        starts = range(0, len(texts), STRETCH)
        return [tokens for start in starts for tokens in self._encode(texts[start : start + STRETCH], max_length)]

    def _encode(self, texts: Sequence[Text], max_length: int) -> list[Tokens]:
        joined = [self._cut(text.instruction + text.text, max_length) for text in texts]
        encoded = self.tokenizer(joined, truncation=True, max_length=max_length, return_attention_mask=False)
        tokens = []
        for text, ids in zip(texts, encoded["input_ids"], strict=True):
            instruction = 0 if self.contract.pool_instruction else self.prompt_length(text.instruction)
            ids = ids or self.tokenizer(".").input_ids
            tokens.append(Tokens(ids, instruction if instruction < len(ids) else 0))
        return tokens

    def _cut(self, text: str, max_length: int) -> str:
        """Spare the tokenizer most of a very long text. Keeps it whole unless what is kept is surely enough."""
        kept = 16 * max_length
        if len(text) <= 4 * kept:
            return text
        enough = len(self.tokenizer(text[:kept], add_special_tokens=False).input_ids) > 2 * max_length
        return text[:kept] if enough else text

    def prompt_length(self, instruction: str) -> int:
        """Tokens of the instruction alone, as sentence-transformers counts them (a closing special token is none)."""
        if instruction not in self._prompt_lengths:
            ids = self.tokenizer(instruction).input_ids if instruction else []
            special = bool(ids) and ids[-1] in self.tokenizer.all_special_ids
            self._prompt_lengths[instruction] = len(ids) - special
        return self._prompt_lengths[instruction]

    def check_instruction(self, instruction: str, max_length: int, flag: str) -> None:
        """Refuse an instruction that leaves no room, or whose last token can swallow a text's first character.

        Raises:
            UserError: naming the instruction.
        """
        length = self.prompt_length(instruction)
        if length + 1 + self.contract.append_eos > max_length:
            raise UserError(f"{flag} {max_length} leaves no room behind the {length} tokens of {instruction!r}")
        melts = instruction != "" and not instruction[-1].isspace()
        for probe in BOUNDARY_PROBES if instruction else ():
            encoded = self.tokenizer(instruction + probe, return_offsets_mapping=True)
            melts = melts or any(end > len(instruction) for _, end in encoded["offset_mapping"][:length])
        if melts:
            raise UserError(
                f"the instruction {instruction!r} can share a token with the text behind it: "
                "end it with a space or a line break"
            )
