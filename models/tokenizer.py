"""Texts to token ids under a contract. Its rules live in the saved tokenizer where that is possible."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from gritlm.errors import UserError, first_line
from gritlm.files import write_json
from gritlm.models.base_files import find_file
from gritlm.models.checks import check_tokenizer_files
from gritlm.models.hub import model_folder
from gritlm.models.text import CONTRACT_FILE, Text, TextContract

TEXTS_PER_CALL = 512
FIRST_CHARACTERS = ("a", "A", "1", "(", ".", "é", "中", '"')  # of a text, tried after an instruction
# AutoTokenizer builds Qwen2's own class for a Qwen2 model, whatever the folder says, and its normalizer replaces the
# saved one. It takes tokenizer.json as it is for the tokenizer of any model type of the generic class, such as this.
LOADER_OPTIONS = {"tokenizer_type": "modernbert"}
PROBES = (
    *("w", "rain", "7", "(", ".", "é", "中文", "привет мир", "🙂", "a\nb", "\tx", " lead", "trail ", "x  y", "", " "),
    *("def f(x):\n    return x", "a <|endoftext|> b", "50 % \u2028 off", "A" * 300, "quiet engine under snow " * 40),
)


def load_tokenizer(
    name_or_path: str, contract: TextContract, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer, changed to follow the contract.

    It pads and truncates on the right, and with `rstrip` it drops trailing white space. Tokens that the base puts
    before a text stay. With `append_eos` a text ends with the token that the base puts there, or else with the
    end-of-text token; without it, with none.

    Raises:
        UserError: there is no fast tokenizer, or a token that is needed is missing.
    """
    check_tokenizer_files(name_or_path)
    file = find_file(name_or_path, "tokenizer.json")  # of an adapter, or of its base
    folder = str(file.parent) if file else model_folder(name_or_path)
    ours = (Path(folder) / CONTRACT_FILE).is_file()
    options: dict = LOADER_OPTIONS if ours else {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name_or_path}: no tokenizer there: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{name_or_path}: found a slow tokenizer, wanted a fast one (tokenizer.json)")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"{name_or_path}: found a tokenizer without pad and end-of-text tokens, wanted one")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = VERY_LARGE_INTEGER  # each call has its limit; a smaller one warns of longer texts
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    _set_rstrip(backend, contract.rstrip)
    _set_template(tokenizer, contract.append_eos, name_or_path)
    return tokenizer


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text."""
    whole, inner = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    start = next(i for i in range(len(whole) + 1) if whole[i : i + len(inner)] == inner)
    return whole[:start], whole[start + len(inner) :]


def _set_rstrip(backend: Tokenizer, rstrip: bool) -> None:
    """Make dropping white space at the end the last step of the normalizer, or take that step off.

    The first step where the others make a letter of a space, as those of SentencePiece models do.
    """
    step, found = normalizers.Strip(left=False, right=True), backend.normalizer
    if rstrip and "strip_right=True" not in repr(found):
        first = found is not None and not found.normalize_str("a ").endswith((" ", "a"))
        backend.normalizer = normalizers.Sequence(([step, found] if first else [found, step]) if found else [step])
    elif not rstrip and isinstance(found, normalizers.Sequence):
        steps = [found[i] for i in range(len(found))]
        for place in (0, -1):
            if steps and repr(steps[place]) == repr(step):
                del steps[place]
                backend.normalizer = normalizers.Sequence(steps)


def _set_template(tokenizer: PreTrainedTokenizerBase, append_eos: bool, name: str) -> None:
    """Replace the post-processor by one template: what the base puts before a text, the text, the end token."""
    before, after = special_tokens_around(tokenizer)
    if append_eos and not after:
        if tokenizer.eos_token is None:
            raise UserError(f"--append_eos: {name} has no end-of-text token")
        after = [tokenizer.eos_token_id]
    after = after if append_eos else []
    ids = {tokenizer.convert_ids_to_tokens(i): i for i in (*before, *after)}
    parts = [*(tokenizer.convert_ids_to_tokens(i) for i in before), "$A"]
    parts += [tokenizer.convert_ids_to_tokens(i) for i in after]
    template = processors.TemplateProcessing(single=parts, special_tokens=list(ids.items()))
    offsets = processors.ByteLevel(trim_offsets=False)  # keeps those of tokens; it adds no token
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([offsets, template] if ids else [offsets])


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path, model_max_length: int | None = None) -> None:
    """Save the tokenizer so that old and new loaders rebuild it from tokenizer.json.

    The generic class is named: a model's own class would rebuild its normalizer and lose the contract. Lists of special
    tokens have the key that transformers 4 reads, too. Nothing of a call's padding or truncation is saved.

    Args:
        model_max_length: the limit in tokens of a loader that is given none. None keeps the base's.
    """
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for key in ("auto_map", "add_eos_token", "add_bos_token"):  # the template has them
        config.pop(key, None)
    write_json(path, config)


def check_saved_tokenizer(folder: str | Path, text_tokenizer: "TextTokenizer") -> list[str]:
    """Compare the ids of probe texts with those of the saved tokenizer, as each loader reads it. Reads no weights.

    Returns:
        A line for each loader whose ids differ where nothing can be done about it.
    Raises:
        UserError: GritLM's or sentence-transformers' loader would give other ids.
    """
    contract, notes = text_tokenizer.contract, []
    instructions = {"", *contract.prompts.values()}
    texts = [instruction + probe for instruction in sorted(instructions) for probe in PROBES]

    def ids_of(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=contract.passage_max_len).input_ids

    wanted = ids_of(text_tokenizer.tokenizer)
    loaders = {
        "GritLM": load_tokenizer(str(folder), contract),
        "sentence-transformers": AutoTokenizer.from_pretrained(folder, **LOADER_OPTIONS),
        "AutoTokenizer": AutoTokenizer.from_pretrained(folder),
    }
    for name, loaded in loaders.items():
        different = [text for text, a, b in zip(texts, ids_of(loaded), wanted, strict=True) if a != b]
        if different and name == "AutoTokenizer":
            option = f"tokenizer_type={LOADER_OPTIONS['tokenizer_type']!r}"
            example = min(different, key=len)
            notes.append(f"AutoTokenizer.from_pretrained without {option} gives other tokens, such as of {example!r}")
        elif different:
            raise UserError(f"{folder}: {name} reads the saved tokenizer differently, first {different[0]!r}")
    return notes


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
        self.checked: bytes | None = None  # the saved files that `check_saved_tokenizer` has passed
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
            alone = instruction if self.contract.rstrip else instruction.rstrip()
            ids = self.tokenizer(alone).input_ids if alone else []
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
        if not instruction or self.contract.pool_instruction:  # then all tokens count, shared or not
            return
        shares = not instruction[-1].isspace()
        for character in FIRST_CHARACTERS:
            encoded = self.tokenizer(instruction + character, return_offsets_mapping=True)
            shares = shares or any(end > len(instruction) for _, end in encoded["offset_mapping"][:length])
        if shares:
            raise UserError(
                f"the instruction {instruction!r} can share a token with the text behind it: "
                "end it with a space or a line break"
            )
