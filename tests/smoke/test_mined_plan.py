"""`gritlm plan --mined_batches`: what it prints, and what it refuses before a model is loaded."""

import json

import numpy as np
import pytest
from helpers import train_flags, write_jsonl

from gritlm.data.records import load_records
from gritlm.errors import UserError
from gritlm.training.plan import main


@pytest.fixture
def folder(tmp_path):
    """Two sets, and vectors of their texts: those of a row are near one another."""
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "first.jsonl", rows=96, negatives=1, seed=1)
    write_jsonl(tmp_path / "data" / "other.jsonl", rows=48, negatives=1, seed=2)
    rng, found = np.random.default_rng(0), {}
    for record_set in load_records(tmp_path / "data", tmp_path / "cache"):
        ids, row, *_ = record_set.text_places()
        centres = rng.normal(size=(6, 16))
        for key, number in zip(ids.tolist(), row.tolist(), strict=True):
            found[key] = centres[number % 6] + 0.3 * rng.normal(size=16)
    vectors = np.array([found[key] / np.linalg.norm(found[key]) for key in sorted(found)], np.float16)
    write_vectors(tmp_path, np.array(sorted(found)), vectors)
    return tmp_path


def write_vectors(folder, ids, vectors) -> None:
    (folder / "vectors").mkdir(exist_ok=True)
    np.save(folder / "vectors" / "ids.npy", ids)
    np.save(folder / "vectors" / "vectors.npy", vectors)
    (folder / "vectors" / "teacher.json").write_text("{}")


def plan(model, folder, capsys, **more) -> str:
    flags = {"mined_batches": folder / "vectors", "cluster_size": 8} | more
    given = {name: value for name, value in flags.items() if value is not None}
    assert main(train_flags(model, folder / "data", folder / "out", folder / "cache", **given)) == 0
    return capsys.readouterr().out


def numbers(text: str) -> tuple[float, float]:
    (line,) = [line for line in text.splitlines() if "similarity of a query" in line]
    near, by_chance = line.split("other rows ")[1].split("),")[0].split(" (random batches ")
    return float(near), float(by_chance)


def test_the_plan_says_what_mined_batches_do(qwen3, folder, capsys):
    out = plan(qwen3, folder, capsys)
    near, by_chance = numbers(out)
    assert near > by_chance + 0.2, "clusters of 8 in batches of 8"
    assert "clusters of 8 rows" in out and "mined batches: none of" not in out
    smaller = numbers(plan(qwen3, folder, capsys, cluster_size=2))
    assert by_chance < smaller[0] < near
    assert "mined batches" not in plan(qwen3, folder, capsys, mined_batches=None, cluster_size=None), "control"


def test_it_goes_with_held_out_rows_and_rows_an_epoch(qwen3, folder, capsys):
    samples = folder / "samples.json"
    samples.write_text(json.dumps({"first": 40, "other": {"rows": 100, "temperature": 0.1}}))
    out = plan(qwen3, folder, capsys, eval_held_out=4, num_samples=samples, max_example_num_per_dataset=30)
    assert "other: 48 rows, 4 held out, 100 taken per epoch" in out
    near, by_chance = numbers(out)
    assert near > by_chance + 0.03


@pytest.mark.parametrize("settings", [{"in_batch_negatives": False}, 7])
def test_sets_that_stay_random_are_named(qwen3, folder, capsys, settings):
    """No in-batch negatives; or too few rows for a batch of their own."""
    samples = folder / "samples.json"
    samples.write_text(json.dumps({"other": settings}))
    assert "  mined batches: none of other (" in plan(qwen3, folder, capsys, num_samples=samples)


def test_what_has_no_effect_or_cannot_work_is_refused(qwen3, folder, capsys):
    def refused(message: str, **more):
        with pytest.raises(UserError, match=message):
            plan(qwen3, folder, capsys, **more)

    refused("--cluster_size 1: wanted 2 or more", cluster_size=1)
    refused("--cluster_size 8 without --mined_batches has no effect", mined_batches=None)
    refused("--mined_batches .*: found no data set with in-batch negatives", in_batch_negatives=False)
    refused("--mined_batches .*/data: cannot be read: .*; wanted vectors.npy, ids.npy", mined_batches=folder / "data")
    ids, vectors = (np.load(folder / "vectors" / name) for name in ("ids.npy", "vectors.npy"))
    write_vectors(folder, ids + 1, vectors)
    refused("--mined_batches .*: found no vector of .* texts of first; run gritlm encode --rows on this very data")
