"""Chunks hold every text, within the token limit."""

import pytest
import torch
from helpers import texts_of

from gritlm.models.chunks import ChunkConfig, make_chunks, to_device
from gritlm.models.tokenizer import Tokens


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("deduplicate", [True, False])
def test_chunks_hold_every_text_within_the_limit(packed, deduplicate):
    texts = [Tokens(list(range(3 + n % 13)), n % 2) for n in range(52)]
    chunks, row_of_text = make_chunks(texts, ChunkConfig(100, packed, deduplicate), 0)
    assert all(chunk["input_ids"].numel() <= 100 for chunk in chunks)
    rows = texts_of(chunks)
    assert len(rows) == (26 if deduplicate else 52), "texts with another prompt length are other texts"
    assert [rows[r] for r in row_of_text] == [(text.ids, text.prompt_length) for text in texts]
    lengths = [len(ids) for ids, _ in rows]
    assert lengths == sorted(lengths, reverse=True)


def test_a_text_above_the_limit_has_a_chunk_for_itself():
    texts = [Tokens([1] * length, 0) for length in (9, 30, 4)]
    chunks, row_of_text = make_chunks(texts, ChunkConfig(10), 0)
    assert [chunk["lengths"].tolist() for chunk in chunks] == [[30], [9], [4]]
    assert row_of_text.tolist() == [1, 0, 2]


def test_padding_has_the_given_id():
    (chunk,), _ = make_chunks([Tokens([1, 2, 3], 1), Tokens([4], 0)], ChunkConfig(100, packed=False), 7)
    assert chunk["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert "equal_length_runs" not in chunk


def test_only_tensors_are_moved_to_the_device():
    moved = to_device({"lengths": torch.tensor([3]), "equal_length_runs": ((1, 3),)}, "meta")
    assert moved["lengths"].device.type == "meta"
    assert moved["equal_length_runs"] == ((1, 3),)
