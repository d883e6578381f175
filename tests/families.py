"""Tiny folders of the families of `FAMILIES`, each with a tokenizer of the form and the class that its models have."""

import json
from pathlib import Path

from helpers import WORDS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, PreTrainedTokenizerFast, set_seed

from gritlm.models.families import FAMILIES, is_encoder, model_options, tiny_config

SPACE = "▁"
TEXTS = [" ".join([*WORDS, ":", "."])] * 4


def _around(tokenizer: Tokenizer, before: str, after: str = "") -> processors.TemplateProcessing:
    ids = [(token, tokenizer.token_to_id(token)) for token in (before, after) if token]
    return processors.TemplateProcessing(single=f"{before} $A {after}".strip(), special_tokens=ids)


def _bytes(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=590, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _bytes_alone() -> tuple[Tokenizer, dict[str, str]]:
    return _bytes(["<|endoftext|>"]), {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def _begin() -> tuple[Tokenizer, dict[str, str]]:
    """Llama 3: a token before each text."""
    tokenizer = _bytes(["<|end_of_text|>", "<|begin_of_text|>"])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _around(tokenizer, "<|begin_of_text|>")]
    )
    return tokenizer, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def _roberta() -> tuple[Tokenizer, dict[str, str]]:
    tokenizer = _bytes(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False)
    return tokenizer, _marks("<s>", "</s>", "<pad>", "<unk>", "<mask>")


def _sentencepiece(prepend: bool) -> tuple[Tokenizer, dict[str, str]]:
    """Mistral and Gemma: spaces become a letter before the tokens are found; Mistral puts one before each text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend(SPACE)] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=590, special_tokens=special[:4], show_progress=False)
    words = [SPACE + word for text in TEXTS for word in text.split()]
    tokenizer.normalizer, kept = normalizers.Sequence([]), tokenizer.normalizer
    tokenizer.train_from_iterator(words, trainer)
    found = json.loads(tokenizer.to_str())
    vocabulary = found["model"]["vocab"]
    vocabulary |= {token: len(vocabulary) + n for n, token in enumerate(t for t in special if t not in vocabulary)}
    tokenizer = Tokenizer.from_str(json.dumps(found))
    tokenizer.normalizer = kept
    tokenizer.post_processor = _around(tokenizer, "<bos>")
    return tokenizer, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


def _wordpiece() -> tuple[Tokenizer, dict[str, str]]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789().:,")
    trainer = trainers.WordPieceTrainer(
        vocab_size=590, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = _around(tokenizer, "[CLS]", "[SEP]")
    return tokenizer, _marks("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")


def _unigram() -> tuple[Tokenizer, dict[str, str]]:
    """XLM-RoBERTa."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = _around(tokenizer, "<s>", "</s>")
    return tokenizer, _marks("<s>", "</s>", "<pad>", "<unk>", "<mask>")


def _marks(first: str, last: str, pad: str, unknown: str, mask: str) -> dict[str, str]:
    named = {"cls_token": first, "sep_token": last, "bos_token": first, "eos_token": last}
    return named | {"pad_token": pad, "unk_token": unknown, "mask_token": mask}


FORMS = {
    "bytes": (_bytes_alone, "GPT2Tokenizer"),
    "begin": (_begin, "PreTrainedTokenizerFast"),
    "sentencepiece": (lambda: _sentencepiece(True), "LlamaTokenizer"),
    "gemma": (lambda: _sentencepiece(False), "GemmaTokenizer"),
    "wordpiece": (_wordpiece, "BertTokenizer"),
    "roberta": (_roberta, "RobertaTokenizer"),
    "unigram": (_unigram, "XLMRobertaTokenizer"),
}


def build_family(folder: Path, name: str, **fields) -> Path:
    """A model with random weights and its tokenizer, as a base model of the hub is saved."""
    make, class_name = FORMS[FAMILIES[name].tokenizer]
    tokenizer, marks = make()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": class_name}))
    config = tiny_config(name, causal=not is_encoder(name))
    config.update({"pad_token_id": tokenizer.token_to_id(marks.get("pad_token", marks["eos_token"]))} | fields)
    set_seed(0)
    AutoModel.from_config(config, **model_options(config)).save_pretrained(folder)
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    saved.pop("is_causal", None)  # no base model says it
    path.write_text(json.dumps(saved))
    return folder
