"""The plan is a pure function of (seed, epoch, step), no batch repeats a text, and unused rows are reported."""

from collections import Counter

import numpy as np
import pytest

from gritlm.data.batch_plan import MIXED, Plan
from gritlm.data.no_repeats import RowTexts
from gritlm.errors import UserError

NAMES, SIZES = ["a", "b", "c"], [103, 57, 20]


def plan(seed=0, batch=16, **options) -> Plan:
    return Plan(NAMES, SIZES, batch, seed, **options)


def batches(plan: Plan, epoch: int):
    return [plan.batch(epoch, step) for step in range(plan.steps_per_epoch)]


def test_a_batch_has_rows_of_one_data_set_and_an_epoch_uses_no_row_twice():
    p = plan()
    for epoch in range(3):
        seen = Counter()
        kinds = Counter()
        for batch in batches(p, epoch):
            kinds[batch.dataset] += 1
            sets = {NAMES[d] for d, _ in batch.rows}
            assert len(batch.rows) == 16
            assert batch.dataset == MIXED or sets == {batch.dataset}
            seen.update(batch.rows)
        assert max(seen.values()) == 1
        assert kinds == {"a": 6, "b": 3, "c": 1, MIXED: 1}  # left over: 7 + 9 + 4 = 20
        assert sum(SIZES) - len(seen) == 4


def test_the_same_seed_epoch_and_step_give_the_same_batch():
    assert batches(plan(), 1) == batches(plan(), 1)
    assert plan().batch(2, 5) == batches(plan(), 2)[5]
    assert batches(plan(), 1) != batches(plan(), 2)
    assert batches(plan(seed=1), 1) != batches(plan(), 1)


def test_every_row_is_used_in_some_epoch():
    p = plan()
    seen = {row for epoch in range(12) for batch in batches(p, epoch) for row in batch.rows}
    assert len(seen) == sum(SIZES)


def test_the_draw_is_a_pure_function_and_takes_no_negative_twice():
    p = plan()
    assert p.draw(1, 2, 0, 7, 3, 10, 4) == plan().draw(1, 2, 0, 7, 3, 10, 4)
    draws = [p.draw(epoch, 2, 0, row, 3, 10, 4) for epoch in range(5) for row in range(40)]
    assert {positive for positive, _ in draws} == {0, 1, 2}
    assert {n for _, negatives in draws for n in negatives} == set(range(10))
    assert all(len(set(negatives)) == 4 for _, negatives in draws)
    assert p.draw(0, 0, 0, 0, 1, 2, 4)[1] in ([0, 1], [1, 0])
    assert p.draw(0, 0, 0, 0, 1, 0, 4)[1] == []


def test_max_per_dataset_uses_the_same_rows_in_every_epoch():
    p = plan(max_per_dataset=32)
    rows = [{row for batch in batches(p, epoch) for row in batch.rows if row[0] == 0} for epoch in range(4)]
    assert all(len(r) == 32 for r in rows)
    assert rows[0] == rows[1] == rows[3]
    other = plan(seed=1, max_per_dataset=32)
    assert rows[0] != {row for batch in batches(other, 0) for row in batch.rows if row[0] == 0}, "control"


def test_fewer_rows_than_one_batch_are_refused():
    with pytest.raises(UserError, match="larger than the data: found 180 rows"):
        plan(batch=181)


def test_the_summary_counts_the_unused_rows():
    assert "  left over: 1 mixed batches, 4 rows not used in this epoch" in plan().describe(ranks=4)


def test_a_data_set_that_no_batch_uses_is_named():
    assert "  data sets of which no row is used in any epoch: c" in plan(num_samples={"c": 0}).describe(1)
    few = Plan(["a", "b"], [33, 9], 32, seed=0)
    assert not {d for batch in batches(few, 0) for d, _ in batch.rows} - {0}
    assert "  data sets of which no row is used in any epoch: b" in few.describe(1)
    assert "no row is used" not in "".join(plan().describe(1)), "control: mixed batches use the smallest"


def test_a_cap_of_no_row_is_no_plan():
    with pytest.raises(UserError, match="is larger than the data: found 0 rows"):
        plan(max_per_dataset=0)


# ---- data-set weights


def taken(p: Plan, epoch: int) -> Counter:
    return Counter(NAMES[d] for batch in batches(p, epoch) for d, _ in batch.rows)


def test_num_samples_sets_the_rows_of_a_data_set_per_epoch():
    p = plan(num_samples={"a": 32, "c": 48})
    assert p.epoch_sizes == [32, 57, 48]
    assert taken(p, 0) == {"a": 32, "b": 48, "c": 48}  # the 9 rows left of b do not fill a batch
    rows = Counter(row for batch in batches(p, 0) for d, row in batch.rows if d == 2)
    assert len(rows) == 20
    assert set(rows.values()) == {2, 3}, "every row twice before any comes a third time"
    with pytest.raises(UserError, match="is larger than the data: found 0 rows"):
        plan(num_samples={"a": 0, "b": 0, "c": 0}, temperature=2.0)
    assert "  c: 20 rows, 48 taken per epoch (2.40 times each), 3 batches, 0 rows left over" in p.describe(1)


def test_temperature_samples_data_sets_by_a_power_of_their_size():
    assert plan(temperature=1.0).epoch_sizes == SIZES
    p = plan(temperature=2.0)
    roots = np.sqrt(SIZES)
    assert p.epoch_sizes == [int(180 * root / roots.sum()) for root in roots]
    assert all(59 <= rows <= 60 for rows in plan(temperature=1e9).epoch_sizes)


# ---- no text twice in a batch


def row_texts(*sets: list[list[int]]) -> RowTexts:
    rows = [row for rows in sets for row in rows]
    return RowTexts(np.cumsum([0, *map(len, rows)]), np.array([text for row in rows for text in row]))


def batches_with_repeats(p: Plan, texts: RowTexts, epoch: int) -> int:
    """The number of batches in which a text appears twice, counted without the plan's own code."""
    count = 0
    for batch in batches(p, epoch):
        ids = [text for row in texts.of(p.first_row[d] + row for d, row in batch.rows) for text in row]
        count += len(ids) != len(set(ids))
    return count


def test_no_batch_repeats_a_text():
    """Passages with several queries each, as in SQuAD, some of them in two data sets."""
    sets = [[[1000 + i, i // 4, 500 + i % 30] for i in range(103)], [[2000 + i, i // 3] for i in range(57)]]
    texts = row_texts(*sets, [[3000 + i, i] for i in range(20)])
    p, careless = plan(row_texts=texts), plan()
    for epoch in range(4):
        assert batches_with_repeats(p, texts, epoch) == 0
        assert batches_with_repeats(careless, texts, epoch) > 0, "control"
        assert len(batches(p, epoch)) == p.steps_per_epoch == careless.steps_per_epoch
        uses = Counter(row for batch in batches(p, epoch) for row in batch.rows)
        assert uses.total() - len(uses) < 10, "few rows are used twice"
    assert p.batches_with_repeats(0) == 0


def test_rows_are_used_again_where_the_others_would_repeat_a_text():
    """A passage of 40 of the 64 rows can be in only one row of each of the 4 batches."""
    texts = row_texts([[1000 + i, 7 if i < 40 else i] for i in range(64)])
    p = Plan(["a"], [64], 16, seed=0, row_texts=texts)
    for epoch in range(3):
        assert batches_with_repeats(p, texts, epoch) == 0
        assert all(len(set(batch.rows)) == 16 for batch in batches(p, epoch))


@pytest.mark.parametrize("kind", ["zipf", "labels"])
def test_a_frequent_positive_is_in_nearly_every_batch(kind):
    """A few of 200 positives belong to a large part of 4,000 rows. Each can be once in each of the 250 batches."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 201)
    positive = rng.choice(200, 4000, p=weights / weights.sum())
    if kind == "labels":
        positive = np.where(rng.random(4000) < 0.9, rng.integers(0, 10, 4000), rng.integers(10, 200, 4000))
    texts = row_texts([[10_000 + row, p] for row, p in enumerate(positive)])
    p = Plan(["a"], [4000], 16, seed=0, row_texts=texts)
    for epoch in range(2):
        assert batches_with_repeats(p, texts, epoch) == 0
        seen = {row for batch in batches(p, epoch) for row in batch.rows}
        possible = np.minimum(np.bincount(positive), p.steps_per_epoch).sum()
        assert 0.99 * possible < len(seen) <= possible < 4000
    uses = Counter(row for batch in batches(p, 0) for row in batch.rows)
    text = "\n".join(p.describe(1))
    assert f"0 mixed batches, {4000 - len(uses)} rows not used in this epoch" in text
    assert f"{uses.total() - len(uses)} places are filled with rows used before" in text


def test_batches_that_must_repeat_a_text_are_reported():
    texts = row_texts([[1000 + i, i % 5] for i in range(64)])  # a classification set with five labels
    p = Plan(["a"], [64], 16, seed=0, row_texts=texts)
    assert len({row for batch in batches(p, 0) for row in batch.rows}) == 64
    assert "4 batches hold a query or a positive twice" in p.describe(1)[-1]


def test_rows_of_a_set_that_never_mixes_are_in_no_mixed_batch():
    p = plan(never_mixed=["a"], batch=12)
    number = p.names.index("a")
    for step in range(p.steps_per_epoch):
        batch = p.batch(0, step)
        assert batch.dataset != MIXED or number not in {dataset for dataset, _ in batch.rows}
    mixed = [p.batch(0, step) for step, name in enumerate(p.datasets(0)) if name == MIXED]
    assert mixed, "control: there are mixed batches"
    usual = plan(batch=12)
    rows = [row for step, name in enumerate(usual.datasets(0)) if name == MIXED for row in usual.batch(0, step).rows]
    assert number in {dataset for dataset, _ in rows}, "control: else they would be"
