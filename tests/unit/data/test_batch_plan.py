"""Which rows form a batch is a pure function of (seed, epoch, step), and nothing is lost silently."""

from collections import Counter

import numpy as np
import pytest

from gritlm.data.batch_plan import MIXED, Plan, read_num_samples
from gritlm.data.no_repeats import RowTexts
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
        assert sum(SIZES) - len(seen) == 4


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
    assert p.draw(1, 2, 0, 7, 3, 10, 4) == plan().draw(1, 2, 0, 7, 3, 10, 4)
    draws = [p.draw(epoch, 2, 0, row, 3, 10, 4) for epoch in range(5) for row in range(40)]
    assert {positive for positive, _ in draws} == {0, 1, 2}
    assert {n for _, negatives in draws for n in negatives} == set(range(10))
    assert all(len(set(negatives)) == 4 for _, negatives in draws)
    assert p.draw(0, 0, 0, 0, 1, 2, 4)[1] in ([0, 1], [1, 0])
    assert p.draw(0, 0, 0, 0, 1, 0, 4)[1] == []


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
    assert "1 mixed batches, 4 rows left out of this epoch" in text


# ---- data-set weights


def taken(p: Plan, epoch: int) -> Counter:
    return Counter(NAMES[d] for batch in batches(p, epoch) for d, _ in batch.rows)


def test_num_samples():
    p = plan(num_samples={"a": 32, "c": 48})
    assert p.used == [32, 57, 48]
    assert taken(p, 0) == {"a": 32, "b": 48, "c": 48}  # the 9 rows of b that are left fill no batch
    rows = Counter(row for batch in batches(p, 0) for d, row in batch.rows if d == 2)
    assert len(rows) == 20
    assert set(rows.values()) == {2, 3}, "every row twice before any comes a third time"
    with pytest.raises(UserError, match="--num_samples: found data set 'd', wanted some of a, b, c"):
        plan(num_samples={"d": 3})
    with pytest.raises(UserError, match="is larger than the data: found 0 rows"):
        plan(num_samples={"a": 0, "b": 0, "c": 0}, temperature=2.0)
    assert "rows 20, 48 taken an epoch (2.40 times each)" in p.describe(1, 3)


def test_the_file_of_num_samples(tmp_path):
    path = tmp_path / "n.json"
    for text, message in (("[1]", "found list"), ("{", "no JSON"), ('{"a": "many"}', "a: found 'many'")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_num_samples(str(path))
    path.write_text('{"a": 5}')
    assert read_num_samples(str(path)) == {"a": 5}
    with pytest.raises(UserError, match="No such file"):
        read_num_samples(str(tmp_path / "absent"))


def test_temperature_sampling():
    assert plan(temperature=1.0).used == SIZES
    p = plan(temperature=2.0)
    roots = np.sqrt(SIZES)
    assert p.used == [int(180 * root / roots.sum()) for root in roots]
    assert all(59 <= used <= 60 for used in plan(temperature=1e9).used)


# ---- no document twice in a batch


def documents(*sets: list[list[int]]) -> RowTexts:
    rows = [row for rows in sets for row in rows]
    return RowTexts(np.cumsum([0, *map(len, rows)]), np.array([i for row in rows for i in row]))


def doubled(p: Plan, docs: RowTexts, epoch: int) -> int:
    """Batches in which some document stands twice."""
    count = 0
    for batch in batches(p, epoch):
        rows = [p.first_row[d] + row for d, row in batch.rows]
        ids = [i for r in rows for i in docs.ids[docs.starts[r] : docs.starts[r + 1]]]
        count += len(ids) != len(set(ids))
    return count


def test_no_document_twice_in_a_batch():
    """Passages with several queries each, as in SQuAD, and some that stand in two data sets."""
    sets = [[[1000 + i, i // 4, 500 + i % 30] for i in range(103)], [[2000 + i, i // 3] for i in range(57)]]
    docs = documents(*sets, [[3000 + i, i] for i in range(20)])
    p, careless = plan(documents=docs), plan()
    for epoch in range(4):
        assert doubled(p, docs, epoch) == 0
        assert doubled(careless, docs, epoch) > 0, "control"
        assert len(batches(p, epoch)) == p.steps_per_epoch == careless.steps_per_epoch
        again = Counter(row for batch in batches(p, epoch) for row in batch.rows)
        assert sum(again.values()) - len(again) < 10, "few rows stand in for those that repeat"
    assert p.repeating(0) == 0


def test_rows_that_have_had_their_turn_stand_in():
    """One passage in 40 of 64 rows cannot stand in more than one row of each of the 4 batches."""
    docs = documents([[1000 + i, 7 if i < 40 else i] for i in range(64)])
    p = Plan(["a"], [64], 16, seed=0, documents=docs)
    for epoch in range(3):
        assert doubled(p, docs, epoch) == 0
        assert all(len(set(batch.rows)) == 16 for batch in batches(p, epoch))


@pytest.mark.parametrize("share", ["zipf", "labels"])
def test_of_documents_with_many_rows_as_many_come_as_there_are_batches(share):
    """200 positives, a few of them in a great part of 4,000 rows: each can come once in each of the 250 batches."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 201)
    positive = rng.choice(200, 4000, p=weights / weights.sum())
    if share == "labels":
        positive = np.where(rng.random(4000) < 0.9, rng.integers(0, 10, 4000), rng.integers(10, 200, 4000))
    docs = documents([[10_000 + row, p] for row, p in enumerate(positive)])
    p = Plan(["a"], [4000], 16, seed=0, documents=docs)
    for epoch in range(2):
        assert doubled(p, docs, epoch) == 0
        seen = {row for batch in batches(p, epoch) for row in batch.rows}
        possible = np.minimum(np.bincount(positive), p.steps_per_epoch).sum()
        assert 0.99 * possible < len(seen) <= possible < 4000
    seen = {row for batch in batches(p, 0) for row in batch.rows}
    assert f"0 mixed batches, {4000 - len(seen)} rows left out of this epoch" in p.describe(1, 2)
    again = sum(Counter(row for batch in batches(p, 0) for row in batch.rows).values()) - len(seen)
    assert f"{again} places are filled by rows that have had their turn" in p.describe(1, 2)


def test_too_few_documents_are_said():
    docs = documents([[1000 + i, i % 5] for i in range(64)])  # a classification set: five labels
    p = Plan(["a"], [64], 16, seed=0, documents=docs)
    assert len({row for batch in batches(p, 0) for row in batch.rows}) == 64
    assert "4 batches hold a query or a positive twice" in p.describe(1, 2)


def test_first_seen():
    docs = documents([[1, 2], [3], [2, 4], [3, 5], [6]])
    assert docs.rows_without_repeats(np.arange(5)).tolist() == [True, True, False, False, True]
    assert docs.rows_without_repeats(np.array([3, 1])).tolist() == [True, False]
    joined = RowTexts.concatenate([documents([[1], [2, 3]]), documents([[4, 5]])])
    assert joined.starts.tolist() == [0, 1, 3, 5] and joined.ids.tolist() == [1, 2, 3, 4, 5]
