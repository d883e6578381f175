"""The text contract: no content token is lost, no text is left without a pooled token, chunks hold what they should."""

import pickle

import pytest
import torch
from helpers import INSTRUCTION, make_builder

from gritlm.errors import UserError
from gritlm.models.chunks import ChunkConfig, make_chunks
from gritlm.models.text import Text, TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer, save_tokenizer

TEXTS = ["stone", "a", "(x)", " leading space", "\nline", "trailing  \n", "中文", "é", "1", "seven bridges while snow"]


def make_text_tokenizer(folder, **options) -> TextTokenizer:
    contract = TextContract(**options)
    return TextTokenizer(load_tokenizer(str(folder), contract), contract)


@pytest.mark.parametrize("instruction", [INSTRUCTION, "Ask:\n", "Ask: \n\n", "query: ", ""])
@pytest.mark.parametrize("eos", [False, True])
def test_the_pooled_tokens_are_the_content(qwen3, instruction, eos):
    text_tokenizer = make_text_tokenizer(qwen3, append_eos=eos)
    text_tokenizer.check_instruction(instruction, 64, "--query_max_len")
    for text, tokens in zip(TEXTS, text_tokenizer([Text(instruction, text) for text in TEXTS], 64), strict=True):
        pooled = text_tokenizer.tokenizer.decode(tokens.ids[tokens.prompt_length :], skip_special_tokens=True)
        assert pooled.strip() == text.strip()
        assert (tokens.ids[-1] == text_tokenizer.tokenizer.eos_token_id) == eos


def test_control_the_stock_tokenizer_loses_the_first_word(qwen3):
    """What the trailing-space rule is for: measured alone, the instruction is a token longer than before a text."""
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(qwen3)
    alone, together = stock(INSTRUCTION).input_ids, stock(INSTRUCTION + "stone").input_ids
    assert "stone" not in stock.decode(together[len(alone) :])
    assert make_text_tokenizer(qwen3).prompt_length(INSTRUCTION) == len(alone) - 1


def test_an_instruction_that_melts_into_the_text_is_refused(qwen3):
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


def test_a_very_long_text_is_cut_quickly_and_exactly(qwen3):
    text_tokenizer = make_text_tokenizer(qwen3)
    for long in ("stone river " * 100_000, " " * 200_000 + "stone", "x" * 200_000):
        (tokens,) = text_tokenizer([Text("", long)], 32)
        assert tokens.ids == text_tokenizer.tokenizer(long, truncation=True, max_length=32).input_ids


def test_no_text_is_without_a_pooled_token(qwen3):
    text_tokenizer = make_text_tokenizer(qwen3)
    texts = [Text("", ""), Text("", " \n"), Text(INSTRUCTION, ""), Text(INSTRUCTION, "  ")]
    for tokens in text_tokenizer(texts, 32):
        assert len(tokens.ids) > tokens.prompt_length


def test_pool_instruction(qwen3):
    (tokens,) = make_text_tokenizer(qwen3, pool_instruction=True)([Text(INSTRUCTION, "stone")], 32)
    assert tokens.prompt_length == 0


@pytest.mark.parametrize("eos", [False, True])
def test_a_saved_tokenizer_keeps_the_contract(qwen3, tmp_path, eos):
    text_tokenizer = make_text_tokenizer(qwen3, append_eos=eos)
    save_tokenizer(text_tokenizer.tokenizer, tmp_path)
    again = make_text_tokenizer(tmp_path, append_eos=eos)
    texts = [Text(INSTRUCTION, text) for text in TEXTS]
    assert text_tokenizer(texts, 32) == again(texts, 32)
    assert repr(again.tokenizer.backend_tokenizer.normalizer).count("Strip") == 1


def texts_of(chunks: list[dict]) -> list[tuple[list[int], int]]:
    """Token ids and prompt_lengths tokens of each text, in the order of the chunks' rows."""
    found = []
    for chunk in chunks:
        ids, lengths = chunk["input_ids"], chunk["lengths"].tolist()
        if "equal_length_runs" in chunk:
            assert [length for count, length in chunk["equal_length_runs"] for _ in range(count)] == lengths
            rows = ids.split(lengths)
        else:
            rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        found += [(row.tolist(), skip) for row, skip in zip(rows, chunk["prompt_lengths"].tolist(), strict=True)]
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("deduplicate", [True, False])
def test_chunks_hold_every_text_within_the_budget(qwen3, packed, deduplicate):
    text_tokenizer = make_text_tokenizer(qwen3)
    texts = [Text(INSTRUCTION, "stone " * (n % 13)) for n in range(50)]
    tokens = text_tokenizer(texts, 40)
    chunks, row_of_text = make_chunks(tokens, ChunkConfig(100, packed, deduplicate), 0)
    assert all(chunk["input_ids"].numel() <= 100 for chunk in chunks)
    rows = texts_of(chunks)
    assert len(rows) == (13 if deduplicate else 50)
    assert [rows[r] for r in row_of_text] == [(t.ids, t.prompt_length) for t in tokens]
    lengths = [len(ids) for ids, _ in rows]
    assert lengths == sorted(lengths, reverse=True)


def test_a_batch_is_the_plans_rows(qwen3, data, tmp_path):
    builder = make_builder(qwen3, data / "hard.jsonl", tmp_path, batch=8, group=3)
    batch = builder[1, 2]
    planned = builder.plan.batch(1, 2)
    contrastive = batch["contrastive"]
    assert batch["rows"] == [f"hard:{row}" for _, row in planned.rows]
    assert contrastive["text_of_slot_S"].shape == (24,)
    assert (contrastive["text_of_slot_S"].view(8, 3)[:, 0] >= 0).all()  # slot 0 holds the positive
    assert batch["real_tokens"] >= batch["encoded_tokens"] == batch["padded_tokens"]

    rows = texts_of(batch["chunks"])
    for number, (_, row) in enumerate(planned.rows):
        record = builder.records[0][row]
        query = builder.text_tokenizer.tokenizer.decode(
            rows[contrastive["text_of_query_B"][number]][0], skip_special_tokens=True
        )
        assert query == INSTRUCTION + record.query.text


def test_a_batch_is_built_alike_in_another_process(qwen3, data, tmp_path):
    """What a data-loader worker started afresh gets: the builder through pickle."""
    builder = make_builder(qwen3, data / "hard.jsonl", tmp_path)
    here = builder[0, 1]
    there = pickle.loads(pickle.dumps(builder))[0, 1]
    assert here["rows"] == there["rows"]
    assert all(torch.equal(here["contrastive"][name], there["contrastive"][name]) for name in here["contrastive"])
    pairs = zip(here["chunks"], there["chunks"], strict=True)
    assert all(str(a) == str(b) for a, b in pairs)


def test_the_positive_is_never_a_negative(qwen3, data, tmp_path):
    builder = make_builder(qwen3, data / "hard.jsonl", tmp_path)
    for step in range(builder.plan.steps_per_epoch):
        contrastive = builder[0, step]["contrastive"]
        ids = contrastive["id_of_slot_S"].view(8, 3)
        used = contrastive["text_of_slot_S"].view(8, 3) >= 0
        for b in range(8):
            assert ids[b, 0] in contrastive["known_positives_BK"][b]
            assert not any(ids[b, g] in contrastive["known_positives_BK"][b] for g in (1, 2) if used[b, g])


def test_a_model_without_a_fast_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer there"):
        load_tokenizer(str(tmp_path), TextContract())
