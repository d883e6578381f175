"""Texts to token ids: no token of a text is lost, and every text has a pooled token."""

import shutil

import pytest
from helpers import INSTRUCTION
from transformers import AutoTokenizer

from gritlm.errors import UserError
from gritlm.models.text import Text, TextContract
from gritlm.models.tiny import build_tokenizer
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer, save_tokenizer

TEXTS = ["stone", "a", "(x)", " leading space", "\nline", "trailing  \n", "中文", "é", "1", "seven bridges while snow"]


def make_text_tokenizer(folder, **options) -> TextTokenizer:
    contract = TextContract(**options)
    return TextTokenizer(load_tokenizer(str(folder), contract), contract)


@pytest.mark.parametrize("instruction", [INSTRUCTION, "Ask:\n", "Ask: \n\n", "query: ", ""])
@pytest.mark.parametrize("eos", [False, True])
def test_the_pooled_tokens_are_those_of_the_text(qwen3, instruction, eos):
    text_tokenizer = make_text_tokenizer(qwen3, append_eos=eos)
    text_tokenizer.check_instruction(instruction, 64, "--query_max_len")
    for text, tokens in zip(TEXTS, text_tokenizer([Text(instruction, text) for text in TEXTS], 64), strict=True):
        pooled = text_tokenizer.tokenizer.decode(tokens.ids[tokens.prompt_length :], skip_special_tokens=True)
        assert pooled.strip() == text.strip()
        assert (tokens.ids[-1] == text_tokenizer.tokenizer.eos_token_id) == eos


def test_control_the_stock_tokenizer_loses_the_first_word(qwen3):
    """It keeps the instruction's trailing space. Alone, the instruction has one token more than before a text."""
    stock = AutoTokenizer.from_pretrained(qwen3)
    alone, together = stock(INSTRUCTION).input_ids, stock(INSTRUCTION + "stone").input_ids
    assert "stone" not in stock.decode(together[len(alone) :])
    assert make_text_tokenizer(qwen3).prompt_length(INSTRUCTION) == len(alone) - 1


def test_an_instruction_that_shares_a_token_with_the_text_or_fills_the_limit_is_refused(qwen3):
    text_tokenizer = make_text_tokenizer(qwen3)
    for instruction in ("Query:", "que"):
        with pytest.raises(UserError, match="end it with a space or a line break"):
            text_tokenizer.check_instruction(instruction, 64, "--query_max_len")
    with pytest.raises(UserError, match="--query_max_len 4 leaves no room"):
        text_tokenizer.check_instruction(INSTRUCTION, 4, "--query_max_len")


def test_truncation_keeps_the_instruction_and_the_end_token(qwen3):
    text_tokenizer = make_text_tokenizer(qwen3, append_eos=True)
    (tokens,) = text_tokenizer([Text(INSTRUCTION, "stone " * 100)], 32)
    assert len(tokens.ids) == 32
    assert tokens.ids[-1] == text_tokenizer.tokenizer.eos_token_id
    assert text_tokenizer.tokenizer.decode(tokens.ids[: tokens.prompt_length]) == INSTRUCTION.rstrip()


@pytest.mark.parametrize(
    ("long", "cut"),
    [("stone river " * 2000, True), ("x" * 24_000, True), (" " * 24_000 + "stone", False)],
    ids=["words", "one word", "white space, which the tokenizer drops where a text ends"],
)
def test_a_very_long_text_is_cut_only_where_its_tokens_stay_the_same(qwen3, long, cut):
    text_tokenizer = make_text_tokenizer(qwen3)
    assert len(text_tokenizer._shorten(long, 32)) == (16 * 32 if cut else len(long))
    (tokens,) = text_tokenizer([Text("", long)], 32)
    assert tokens.ids == text_tokenizer.tokenizer(long, truncation=True, max_length=32).input_ids


def test_every_text_has_a_pooled_token(qwen3):
    text_tokenizer = make_text_tokenizer(qwen3)
    texts = [Text("", ""), Text("", " \n"), Text(INSTRUCTION, ""), Text(INSTRUCTION, "  ")]
    for tokens in text_tokenizer(texts, 32):
        assert len(tokens.ids) > tokens.prompt_length


@pytest.mark.parametrize("contract", [True, False])
def test_the_instruction_is_pooled_if_the_contract_or_the_call_says_so(qwen3, contract):
    text_tokenizer = make_text_tokenizer(qwen3, pool_instruction=contract)
    for call in (None, True, False):
        (tokens,) = text_tokenizer([Text(INSTRUCTION, "stone")], 32, pool_instruction=call)
        assert (tokens.prompt_length == 0) == (contract if call is None else call)


@pytest.mark.parametrize("eos", [False, True])
def test_a_saved_tokenizer_keeps_the_contract(qwen3, tmp_path, eos):
    text_tokenizer = make_text_tokenizer(qwen3, append_eos=eos)
    save_tokenizer(text_tokenizer.tokenizer, tmp_path)
    again = make_text_tokenizer(tmp_path, append_eos=eos)
    texts = [Text(INSTRUCTION, text) for text in TEXTS]
    assert text_tokenizer(texts, 32) == again(texts, 32)
    assert repr(again.tokenizer.backend_tokenizer.normalizer).count("Strip") == 1


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"found no tokenizer\.json, wanted a model with its tokenizer"):
        load_tokenizer(str(tmp_path), TextContract())


@pytest.mark.parametrize("base", ["qwen3", "qwen2"])
def test_without_rstrip_nothing_rests_on_the_normalizer(request, base, tmp_path):
    """A loader that runs no normalizer has the same ids. A base that has the step loses it."""
    folder = request.getfixturevalue(base)
    stripped = make_text_tokenizer(folder)
    save_tokenizer(stripped.tokenizer, tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    for name in (folder, tmp_path):
        kept = make_text_tokenizer(name, rstrip=False, pool_instruction=True, append_eos=True)
        assert "Strip" not in repr(kept.tokenizer.backend_tokenizer.normalizer)
        for text in TEXTS:
            (tokens,) = kept([Text(INSTRUCTION, text)], 64)
            assert kept.tokenizer.decode(tokens.ids[:-1]) == INSTRUCTION + text
        (tokens,) = kept([Text(INSTRUCTION, "stone")], 64, pool_instruction=False)
        assert kept.tokenizer.decode(tokens.ids[tokens.prompt_length :], skip_special_tokens=True).strip() == "stone"
    (tokens,) = stripped([Text(INSTRUCTION, "trailing  \n")], 64)
    assert stripped.tokenizer.decode(tokens.ids).endswith("trailing"), "control"


def test_without_rstrip_a_tokenizer_without_any_normalizer_stays_so(tmp_path):
    build_tokenizer(tmp_path, ["stone river "] * 9, vocabulary=300)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    save_tokenizer(make_text_tokenizer(tmp_path).tokenizer, tmp_path)
    for _ in range(2):
        kept = make_text_tokenizer(tmp_path, rstrip=False)
        assert kept.tokenizer("stone ").input_ids != kept.tokenizer("stone").input_ids
        save_tokenizer(kept.tokenizer, tmp_path)
    stripped = make_text_tokenizer(tmp_path).tokenizer
    assert stripped.decode(stripped("stone ").input_ids) == "stone", "control"
