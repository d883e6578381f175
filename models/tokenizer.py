"""Texts to token ids under a contract. Its rules live in the saved tokenizer where that is possible."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gritlm.errors import UserError
from gritlm.models.text import Text, TextContract

TEXTS_PER_CALL = 512
FIRST_CHARACTERS = ("a", "A", "1", "(", ".", "é", "中", '"')  # of a text, tried after an instruction


def load_tokenizer(
    name_or_path: str, contract: TextContract, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer, changed to follow the contract.

    It pads and truncates on the right, drops trailing white space, and appends the end-of-text token if asked to.

    Raises:
        UserError: there is no fast tokenizer, or a token that is needed is missing.
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
    """Save under the generic class. The model's own class would rebuild its normalizer and lose the contract."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


@dataclass
class Tokens:
    """A text's token ids; the first `prompt_length` of them are the instruction's and are not pooled."""

    ids: list[int]
    prompt_length: int


class TextTokenizer:
    """Texts to token ids under a contract. Holds no model.

    Every text gets at least one pooled token. An empty text is encoded as a full stop. If only the instruction's tokens
    are left, they are pooled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, contract: TextContract):
        self.tokenizer, self.contract = tokenizer, contract
        self._prompt_lengths: dict[str, int] = {}

    def __call__(self, texts: Sequence[Text], max_length: int, pool_instruction: bool | None = None) -> list[Tokens]:
        """Tokenise texts, each with its instruction.

        Args:
            max_length: limit in tokens, instruction included; longer texts are cut at the end.
            pool_instruction: None is the contract's choice.
        """
        pooled = self.contract.pool_instruction if pool_instruction is None else pool_instruction
        tokens = []
        # In parts: the tokenizer holds what it truncated until a call ends.
        for start in range(0, len(texts), TEXTS_PER_CALL):
            part = texts[start : start + TEXTS_PER_CALL]
            joined = [self._shorten(text.instruction + text.text, max_length) for text in part]
            encoded = self.tokenizer(joined, truncation=True, max_length=max_length, return_attention_mask=False)
            for text, ids in zip(part, encoded["input_ids"], strict=True):
                prompt_length = 0 if pooled else self.prompt_length(text.instruction)
                ids = ids or self.tokenizer(".").input_ids
                tokens.append(Tokens(ids, prompt_length if prompt_length < len(ids) else 0))
        return tokens

    def _shorten(self, text: str, max_length: int) -> str:
        """Cut a very long text, so that the tokenizer is fast, where the rest certainly fills `max_length`."""
        kept = 16 * max_length
        if len(text) <= 4 * kept:
            return text
        enough = len(self.tokenizer(text[:kept], add_special_tokens=False).input_ids) > 2 * max_length
        return text[:kept] if enough else text

    def prompt_length(self, instruction: str) -> int:
        """Tokens of the instruction alone, as sentence-transformers counts them: without a final special token."""
        if instruction not in self._prompt_lengths:
            ids = self.tokenizer(instruction).input_ids if instruction else []
            special = bool(ids) and ids[-1] in self.tokenizer.all_special_ids
            self._prompt_lengths[instruction] = len(ids) - special
        return self._prompt_lengths[instruction]

    def check_instruction(self, instruction: str, max_length: int, flag: str) -> None:
        """Refuse an instruction that leaves no room for a text, or that can share a token with the text after it.

        Raises:
            UserError: naming the instruction.
        """
        length = self.prompt_length(instruction)
        if length + 1 + self.contract.append_eos > max_length:
            raise UserError(f"{flag} {max_length} leaves no room behind the {length} tokens of {instruction!r}")
        shares = instruction != "" and not instruction[-1].isspace()
        for character in FIRST_CHARACTERS if instruction else ():
            encoded = self.tokenizer(instruction + character, return_offsets_mapping=True)
            shares = shares or any(end > len(instruction) for _, end in encoded["offset_mapping"][:length])
        if shares:
            raise UserError(
                f"the instruction {instruction!r} can share a token with the text behind it: "
                "end it with a space or a line break"
            )
