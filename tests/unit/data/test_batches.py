"""A batch holds the planned rows, is a pure function of its step, and never has a positive among its negatives."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from helpers import INSTRUCTION, make_builder, texts_of


def test_a_batch_is_the_plans_rows(qwen3, data, tmp_path):
    builder = make_builder(qwen3, data / "hard.jsonl", tmp_path, batch=8, group=3)
    batch = builder[1, 2]
    planned = builder.plan.batch(1, 2)
    contrastive = batch.contrastive
    assert batch.rows == [f"hard:{row}" for _, row in planned.rows]
    assert contrastive.text_of_slot_S.shape == (24,)
    assert (contrastive.text_of_slot_S.view(8, 3)[:, 0] >= 0).all()  # slot 0 holds the positive
    assert batch.real_tokens >= batch.encoded_tokens == batch.padded_tokens

    rows = texts_of(batch.chunks)
    for number, (_, row) in enumerate(planned.rows):
        record = builder.records[0][row]
        query = builder.text_tokenizer.tokenizer.decode(
            rows[contrastive.text_of_query_B[number]][0], skip_special_tokens=True
        )
        assert query == INSTRUCTION + record.query.text


def test_a_batch_is_built_alike_in_another_process(qwen3, data, tmp_path, monkeypatch):
    """A process started afresh has other string hashes, so code that depends on the order of a set would differ."""
    builder = make_builder(qwen3, data / "hard.jsonl", tmp_path)
    here = builder[0, 1]
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        assert other.submit(hash, "stone").result() != hash("stone"), "control: it is the same process"
        there = other.submit(builder.__getitem__, (0, 1)).result()
    assert here.rows == there.rows
    contrastive = zip(vars(here.contrastive).values(), vars(there.contrastive).values(), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in contrastive)
    assert all(str(a) == str(b) for a, b in zip(here.chunks, there.chunks, strict=True))


def test_the_positive_is_never_a_negative(qwen3, data, tmp_path):
    builder = make_builder(qwen3, data / "hard.jsonl", tmp_path)
    for step in range(builder.plan.steps_per_epoch):
        contrastive = builder[0, step].contrastive
        ids = contrastive.id_of_slot_S.view(8, 3)
        used = contrastive.text_of_slot_S.view(8, 3) >= 0
        for b in range(8):
            assert ids[b, 0] in contrastive.known_positives_BK[b]
            assert not any(ids[b, g] in contrastive.known_positives_BK[b] for g in (1, 2) if used[b, g])
