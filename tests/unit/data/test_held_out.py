"""Held-out rows: no text of theirs is trained on; data, seed and number decide; without them nothing changes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from gritlm.data.batch_plan import Plan
from gritlm.data.batches import BatchBuilder
from gritlm.data.held_out import NOTHING, HeldOut, hold_out
from gritlm.data.no_repeats import RowTexts
from gritlm.data.records import RecordSet, load_records


@pytest.fixture
def records(tmp_path) -> list[RecordSet]:
    """Two sets that share texts: chains of rows, a query with two instructions, a query that is a positive."""
    rng = random.Random(0)
    for name, rows in (("first", 80), ("second", 120)):
        with open(tmp_path / f"{name}.jsonl", "w") as out:
            for number in range(rows):
                key = rng.randrange(150)
                instruction = rng.choice(["", "Find: "])
                query = f"text {key + 1}" if number % 7 == 0 else f"query {key}"
                row = {
                    "query": [instruction, query],
                    "pos": [f"text {key}"],
                    "neg": [f"text {rng.randrange(300)}", f"query {rng.randrange(150)}", f"bad {number}"],
                }
                out.write(json.dumps(row) + "\n")
    return load_records(tmp_path, tmp_path / "cache")


def choose(records: list[RecordSet], count: int = 12, seed: int = 3) -> HeldOut:
    texts = RowTexts.concatenate([r.texts_without_instructions for r in records])
    return hold_out(texts, list(map(len, records)), [count] * len(records), seed)


def texts_of(records: list[RecordSet], rows) -> tuple[set[str], set[str]]:
    """The texts of rows that are a query or a positive, and those that are a negative."""
    everything = [record_set[i] for record_set in records for i in range(len(record_set))]
    chosen = [everything[row] for row in rows]
    asked = {record.query.text for record in chosen} | {text.text for r in chosen for text in r.positives}
    return asked, {text.text for record in chosen for text in record.negatives}


def test_no_text_of_theirs_is_trained_on(records):
    held = choose(records)
    others = np.setdiff1d(np.arange(200), held.rows)
    assert texts_of(records, held.rows)[0].isdisjoint(texts_of(records, others)[0])
    per_set = np.bincount((held.rows >= 80).astype(int), minlength=2)
    assert (per_set > 6).all() and (per_set <= 12).all()

    control = np.random.default_rng(3).permutation(200)[: len(held.rows)]
    kept = np.setdiff1d(np.arange(200), control)
    assert not texts_of(records, control)[0].isdisjoint(texts_of(records, kept)[0]), "rows drawn one by one"


def test_a_function_of_data_seed_and_number(records):
    assert np.array_equal(choose(records).rows, choose(records).rows)
    assert not np.array_equal(choose(records).rows, choose(records, seed=4).rows)
    assert len(choose(records, 24).rows) > len(choose(records).rows)


def make_plan(records: list[RecordSet], held: HeldOut, **options) -> Plan:
    row_texts = RowTexts.concatenate([r.row_texts for r in records])
    return Plan(
        [r.name for r in records], list(map(len, records)), 16, 5, row_texts=row_texts, held_out=held, **options
    )


class Tokenizer:
    """Notes what is tokenised."""

    def __init__(self, inner):
        self.inner, self.contract, self.tokenizer, self.seen = inner, inner.contract, inner.tokenizer, set()

    def __call__(self, texts, *args):
        self.seen |= {text.text for text in texts}
        return self.inner(texts, *args)


def test_batches_have_none_of_their_texts(records, qwen3):
    from gritlm.models.chunks import ChunkConfig
    from gritlm.models.text import TextContract
    from gritlm.models.tokenizer import TextTokenizer, load_tokenizer

    contract = TextContract()
    inner = TextTokenizer(load_tokenizer(str(qwen3), contract), contract)

    def seen(plan: Plan) -> set[str]:
        tokenizer = Tokenizer(inner)
        builder = BatchBuilder(plan, records, tokenizer, 4, ChunkConfig(512))  # type: ignore[arg-type]
        for epoch in range(3):
            for step in range(len(builder)):
                builder[epoch, step]
        return tokenizer.seen

    held = choose(records)
    own = texts_of(records, held.rows)[0]
    assert own.isdisjoint(seen(make_plan(records, held)))
    assert not own.isdisjoint(seen(make_plan(records, HeldOut(held.rows, frozenset())))), "control: as negatives"


def test_with_a_cap_and_in_words(records):
    held = choose(records)
    plan = make_plan(records, held, max_per_dataset=40)
    for epoch in range(2):
        rows = {plan.first_row[s] + row for k in range(plan.steps_per_epoch) for s, row in plan.batch(epoch, k).rows}
        assert rows.isdisjoint(held.rows.tolist())
    assert any(f"first: 80 rows, {len(plan.held_rows[0])} held out, 40 taken per epoch" in x for x in plan.describe(1))


def test_without_any_the_batches_are_as_before(records):
    """The rows of a set come from an array now; a permutation of it is that of its length."""
    for size in (1, 7, 1000):
        one, other = (np.random.default_rng((1, 1, 0)).permutation(x) for x in (size, np.arange(size)))
        assert np.array_equal(one, other)
    plan, control = make_plan(records, NOTHING), make_plan(records, choose(records))
    assert plan.available == [80, 120] and control.available != plan.available


def test_rows_that_all_share_a_text_are_not_held_out(tmp_path: Path):
    row = {"pos": ["the one answer"], "neg": []}
    lines = [json.dumps({"query": f"question {number}", **row}) for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert len(choose(load_records(tmp_path, tmp_path / "cache")).rows) == 0
