"""Mined batches: near queries meet, every epoch anew, and the plan is the same on every machine."""

import json
from collections import Counter

import numpy as np
import pytest

from gritlm.data.batch_plan import MIXED, Plan
from gritlm.data.held_out import HeldOut
from gritlm.data.mined_batches import MinedBatches, mine_batches, order_by_nearness
from gritlm.data.no_repeats import RowTexts
from gritlm.data.records import load_records
from gritlm.data.teacher_vectors import TeacherVectors
from gritlm.errors import UserError

TOPICS, PER_TOPIC, WIDTH = 12, 40, 24


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(
    folder, topics=TOPICS, per_topic=PER_TOPIC, width=WIDTH, name="a", seed=0, positive=lambda number, topic: number
):
    """Rows of several topics in random order, and the vectors of their texts. Returns the data and each row's topic."""
    rng = np.random.default_rng(seed)
    topic = rng.permutation(np.repeat(np.arange(topics), per_topic))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    with open(folder / "data" / f"{name}.jsonl", "w") as out:
        for number in range(len(topic)):
            row = {
                "query": f"{name} query {number}",
                "pos": [f"{name} positive {positive(number, topic[number])}"],
                "neg": [],
            }
            out.write(json.dumps(row) + "\n")
    records = load_records(folder / "data", folder / "cache")
    centres = rng.normal(size=(topics, width))
    found: dict[int, np.ndarray] = {}
    for record_set in records:
        texts = record_set.row_texts
        for row in range(len(record_set)):
            for text in texts.of([row])[0]:
                found[text] = centres[topic[row] if record_set.name == name else 0] + 0.3 * rng.normal(size=width)
    write_vectors(folder / "vectors", found)
    return records, topic


def write_vectors(folder, found: dict[int, np.ndarray]) -> None:
    folder.mkdir(exist_ok=True)
    ids = np.array(sorted(found))
    np.save(folder / "ids.npy", ids)
    np.save(folder / "vectors.npy", unit(np.array([found[key] for key in ids.tolist()])).astype(np.float16))
    (folder / "teacher.json").write_text("{}")


def mined(folder, records, size=8, wanted=None) -> MinedBatches:
    return mine_batches(str(folder / "vectors"), records, wanted or [True] * len(records), size, str(folder / "cache"))


def plan_of(records, batch=16, **options) -> Plan:
    texts = RowTexts.concatenate([r.row_texts for r in records])
    return Plan([r.name for r in records], list(map(len, records)), batch, 0, row_texts=texts, **options)


def rows_of(plan: Plan, epoch=0) -> list[list[tuple[int, int]]]:
    return [plan.batch(epoch, step).rows for step in range(plan.steps_per_epoch)]


def same_topic(plan: Plan, topic, epoch=0) -> float:
    """The share of pairs of rows in a batch that are of one topic."""
    shares = []
    for rows in rows_of(plan, epoch):
        topics = topic[[row for _, row in rows]]
        equal = topics[:, None] == topics
        shares.append((equal.sum() - len(rows)) / (len(rows) * (len(rows) - 1)))
    return float(np.mean(shares))


def test_near_rows_meet_in_a_batch(tmp_path):
    """Clusters of 8 in batches of 16: 7 of the 15 others are of the own topic, where topics are apart."""
    records, topic = write(tmp_path)
    near, random = plan_of(records, mined=mined(tmp_path, records)), plan_of(records)
    assert same_topic(near, topic) > 0.4
    assert same_topic(random, topic) < 0.12, "control"
    assert same_topic(plan_of(records, mined=mined(tmp_path, records, size=16)), topic) > 0.7


def test_the_plan_is_pure_and_uses_each_row_at_most_once(tmp_path):
    records, _ = write(tmp_path)
    first, second = (plan_of(records, mined=mined(tmp_path, records)) for _ in range(2))
    for epoch in range(3):
        assert rows_of(first, epoch) == rows_of(second, epoch)
        assert first.batch(epoch, 5).rows == plan_of(records, mined=mined(tmp_path, records)).batch(epoch, 5).rows
        assert max(Counter(row for rows in rows_of(first, epoch) for row in rows).values()) == 1
    assert first.steps_per_epoch == plan_of(records).steps_per_epoch == 30


def test_other_rows_meet_in_each_epoch(tmp_path):
    records, _ = write(tmp_path)
    plan = plan_of(records, mined=mined(tmp_path, records))

    def pairs(epoch: int) -> set:
        return {(a, b) for rows in rows_of(plan, epoch) for a in rows for b in rows if a < b}

    again = len(pairs(0) & pairs(1)) / len(pairs(0))
    assert again < 0.35
    assert len(pairs(0) & pairs(0)) / len(pairs(0)) == 1, "control"


def test_no_text_is_twice_in_a_batch(tmp_path):
    """Two near queries share a positive: they may not meet, others of the topic may."""

    def positive(number: int, topic: int) -> int:
        return 20 * topic + number % 20

    records, topic = write(tmp_path, positive=positive)
    mine = mined(tmp_path, records)
    plan, careless = plan_of(records, mined=mine), Plan(["a"], [len(topic)], 16, 0, mined=mine)

    def repeats(plan: Plan, epoch: int) -> list[int]:
        return [len(rows) - len({positive(row, topic[row]) for _, row in rows}) for rows in rows_of(plan, epoch)]

    for epoch in range(3):
        assert not any(repeats(plan, epoch))
        assert plan.batches_with_repeats(epoch) == 0
        assert any(repeats(careless, epoch)), "control"
        assert len({row for rows in rows_of(plan, epoch) for row in rows}) > 460
    assert same_topic(plan, topic) > 0.25 > 2 * same_topic(plan_of(records), topic)


def test_repeats_are_ordered_apart():
    """Five questions on each passage, all near one another: without that, most rows of a cluster would be postponed."""
    rng = np.random.default_rng(0)
    passage = rng.permutation(np.repeat(np.arange(800), 5))
    texts = RowTexts(np.arange(0, 8001, 2), np.stack([10_000 + np.arange(4000), passage], axis=1).ravel())
    assert texts.earlier_uses(np.arange(4000)).tolist() == [
        int((passage[:row] == passage[row]).sum()) for row in range(4000)
    ]
    places = np.argsort(np.argsort(passage, kind="stable")).astype(np.int32)
    mine = MinedBatches(32, [places], TeacherVectors.__new__(TeacherVectors))

    def near(plan: Plan) -> float:
        batches = [passage[[row for _, row in rows]] for rows in rows_of(plan)]
        return float(np.mean([(np.abs(batch[:, None] - batch) < 64).mean() for batch in batches]))

    plan = Plan(["a"], [4000], 64, 0, row_texts=texts, mined=mine)
    assert near(plan) > 0.4
    assert near(Plan(["a"], [4000], 64, 0, row_texts=texts)) < 0.2, "control"
    assert plan.batches_with_repeats(0) == 0


def test_equal_and_few_queries(tmp_path):
    records, _ = write(tmp_path, topics=1, per_topic=5)
    places = mined(tmp_path, records, size=32).places[0]
    assert sorted(places) == list(range(5))
    equal = order_by_nearness(np.full((100, 8), 181, dtype=np.int16), "equal")
    assert sorted(equal) == list(range(100))
    plan = plan_of(records, batch=4, mined=mined(tmp_path, records, size=4))
    assert len(rows_of(plan)) == 1


def test_it_goes_with_the_other_ways_to_choose_rows(tmp_path):
    write(tmp_path, name="b", topics=3, seed=1)
    records, _ = write(tmp_path)
    options = {"max_per_dataset": 100, "num_samples": {"a": 200, "b": 50}, "temperature": 2.0}
    held = HeldOut(np.arange(0, 480, 5), frozenset())
    plan = plan_of(records, mined=mined(tmp_path, records), held_out=held, **options)
    plain = plan_of(records, held_out=held, **options)
    assert [batch.dataset for batch in map(plan.batch, [0] * 9, range(9))] == plan.datasets(0)[:9]
    assert plan.epoch_sizes == plain.epoch_sizes and plan.steps_per_epoch == plain.steps_per_epoch
    used = Counter(row for rows in rows_of(plan) for row in rows)
    assert not {row for number, row in used if number == 0} & set(held.rows.tolist())
    assert {row for number, row in used if number == 0} <= {
        row for epoch in range(20) for rows in rows_of(plain, epoch) for number, row in rows if number == 0
    }
    assert len({row for number, row in used if number == 0}) <= 100
    for step, name in enumerate(plan.datasets(0)):
        assert name == MIXED or {records[number].name for number, _ in plan.batch(0, step).rows} == {name}


def test_a_set_that_is_not_wanted_keeps_its_random_batches(tmp_path):
    write(tmp_path, name="b", topics=3, seed=1)
    records, _ = write(tmp_path)
    near, random = plan_of(records, mined=mined(tmp_path, records, wanted=[True, False])), plan_of(records)

    def batches(plan: Plan, name: str) -> list:
        return sorted(plan.batch(0, step).rows for step, own in enumerate(plan.datasets(0)) if own == name)

    assert batches(near, "b") == batches(random, "b")
    assert batches(near, "a") != batches(random, "a"), "control"


def test_the_order_does_not_depend_on_the_order_of_sums(tmp_path):
    """Whole numbers: the columns in another order, and so every sum, give the same order of rows."""
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(4000, 64)))
    whole = np.rint(512 * vectors).astype(np.int16)
    turn = rng.permutation(64)
    assert (order_by_nearness(whole.copy(), "a") == order_by_nearness(whole[:, turn].copy(), "a")).all()
    a, b = (vectors @ vectors[0]).astype(np.float32), vectors[:, turn].astype(np.float32) @ vectors[0, turn]
    assert (a != b).any(), "control: with fractions sums do depend on it"


def test_wide_vectors_are_projected(tmp_path):
    records, topic = write(tmp_path, width=700)
    assert same_topic(plan_of(records, mined=mined(tmp_path, records)), topic) > 0.4


def test_a_cached_order_is_read_and_a_damaged_one_made_again(tmp_path):
    records, _ = write(tmp_path)
    places = mined(tmp_path, records).places[0]
    (cached,) = (tmp_path / "cache").glob("order-*.npy")
    order = np.load(cached)
    np.save(cached, order[::-1])
    assert (mined(tmp_path, records).places[0] == len(order) - 1 - places).all(), "control: it is read"
    for damaged in (b"", b"no array", cached.read_bytes()[:500]):
        cached.write_bytes(damaged)
        assert (mined(tmp_path, records).places[0] == places).all()
    np.save(cached, np.zeros_like(order))
    assert (mined(tmp_path, records).places[0] == places).all()
    assert (np.load(cached) == order).all()


def test_other_vectors_are_another_order(tmp_path):
    records, _ = write(tmp_path)
    places, before = mined(tmp_path, records).places[0], TeacherVectors(tmp_path / "vectors").fingerprint()
    vectors = np.load(tmp_path / "vectors" / "vectors.npy")
    np.save(tmp_path / "vectors" / "vectors.npy", vectors[np.random.default_rng(1).permutation(len(vectors))])
    assert (mined(tmp_path, records).places[0] != places).any()
    assert TeacherVectors(tmp_path / "vectors").fingerprint() != before


def test_missing_and_damaged_vectors_are_refused(tmp_path):
    records, _ = write(tmp_path)
    ids, vectors = (np.load(tmp_path / "vectors" / name) for name in ("ids.npy", "vectors.npy"))
    query = int(np.searchsorted(ids, records[0].row_texts.ids[0]))
    for value in (np.nan, np.inf, 0.0, 0.5):
        damaged = vectors.copy()
        damaged[query] = value
        np.save(tmp_path / "vectors" / "vectors.npy", damaged)
        with pytest.raises(UserError, match=r"--mined_batches .*norm"):
            mined(tmp_path, records)
    np.save(tmp_path / "vectors" / "vectors.npy", np.delete(vectors, query, axis=0))
    np.save(tmp_path / "vectors" / "ids.npy", np.delete(ids, query))
    with pytest.raises(UserError, match=r"--mined_batches .*: found no vector of 1 of 960 texts of a; run"):
        mined(tmp_path, records)
    with pytest.raises(UserError, match=r"--mined_batches .*cannot be read"):
        mine_batches(str(tmp_path), records, [True], 8, str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("order-*"))
    write_vectors(tmp_path / "vectors", dict(zip(ids.tolist(), vectors.astype(float), strict=True)))
    mined(tmp_path, records)  # control
