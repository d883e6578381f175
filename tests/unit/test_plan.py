"""Contract C3: which rows form a batch is a pure function of (seed, epoch, step), and nothing is lost silently."""

from collections import Counter

import pytest

from gritlm.data.plan import MIXED, Plan
from gritlm.errors import UserError

NAMES, SIZES = ["a", "b", "c"], [103, 57, 20]


def plan(seed=0, batch=16, **options) -> Plan:
    return Plan(NAMES, SIZES, batch, seed, **options)


def batches(plan: Plan, epoch: int):
    return [plan.batch(epoch, step) for step in range(plan.steps_per_epoch)]


def test_a_batch_is_of_one_set_and_no_row_comes_twice():
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
        assert p.waiting == 4
        assert sum(SIZES) - len(seen) == p.waiting


def test_pure():
    assert batches(plan(), 1) == batches(plan(), 1)
    assert plan().batch(2, 5) == batches(plan(), 2)[5]
    assert batches(plan(), 1) != batches(plan(), 2)
    assert batches(plan(seed=1), 1) != batches(plan(), 1)


def test_every_row_comes_in_some_epoch():
    p = plan()
    seen = {row for epoch in range(12) for batch in batches(p, epoch) for row in batch.rows}
    assert len(seen) == sum(SIZES)


def test_the_draw_is_pure_and_without_repeats():
    p = plan()
    assert p.draw(1, 0, 7, 3, 10, 4) == plan().draw(1, 0, 7, 3, 10, 4)
    draws = [p.draw(epoch, 0, row, 3, 10, 4) for epoch in range(5) for row in range(40)]
    assert {positive for positive, _ in draws} == {0, 1, 2}
    assert {n for _, negatives in draws for n in negatives} == set(range(10))
    assert all(len(set(negatives)) == 4 for _, negatives in draws)
    assert p.draw(0, 0, 0, 1, 2, 4)[1] in ([0, 1], [1, 0])
    assert p.draw(0, 0, 0, 1, 0, 4)[1] == []


def test_the_cap_is_one_draw_for_all_epochs():
    p = plan(max_per_dataset=32)
    rows = [{row for batch in batches(p, epoch) for row in batch.rows if row[0] == 0} for epoch in range(4)]
    assert all(len(r) == 32 for r in rows)
    assert rows[0] == rows[1] == rows[3]


def test_too_little_data():
    with pytest.raises(UserError, match="larger than the data: found 180 rows"):
        plan(batch=181)


def test_it_says_how_many_negatives_a_query_sees():
    text = plan().describe(ranks=4, group_size=3)
    assert "47 negatives: 2 hard, 9 in-batch, 36 from other ranks" in text
    assert "1 mixed batches, 4 rows wait" in text
