import json

import pytest
from reports import log_entry, write_evaluation, write_run

from gritlm.errors import UserError
from gritlm.report.run import find_run, read_run


def test_a_run_that_was_resumed_has_each_step_once(tmp_path):
    steps = [1, 2, 3, 2, 3, 4]
    log = "".join(json.dumps(log_entry(step, loss=float(place))) + "\n" for place, step in enumerate(steps))
    run = read_run(write_run(tmp_path / "run", log=log, starts=[{"ranks": 2, "device": "CPU"}, {"ranks": 8}]))
    assert run.curves["loss"] == {1: 0.0, 2: 3.0, 3: 4.0, 4: 5.0} and run.last_step == 4
    assert [start["ranks"] for start in run.starts] == [2, 8] and run.starts[1]["device"] == "CPU"
    assert run.terms == ["info_nce", "matryoshka"]
    assert set(run.under("loss/")) == {"hard", "plain"}
    assert run.notes == []


@pytest.mark.parametrize(
    "cut", ['{"step": 4, "lo', "[]\n3\nnull\n", '{"step": null}\n{"step": "a"}\n{"step": 1e999}\n', "\ufffd"]
)
def test_lines_that_are_no_entries_are_counted(tmp_path, cut):
    whole = "".join(json.dumps(log_entry(step)) + "\n" for step in range(1, 4))
    run = read_run(write_run(tmp_path / "run", log=whole + cut))
    assert list(run.curves["loss"]) == [1, 2, 3]
    lines = len(cut.splitlines())
    assert run.notes == [f"log.jsonl: {lines} of {3 + lines} lines could not be read and are left out"]


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    lines = [log_entry(1, loss="x"), log_entry(2, grad_norm=None), log_entry(3, grad_norm=True)]
    run = read_run(write_run(tmp_path / "run", log="\n".join(map(json.dumps, lines))))
    assert list(run.curves["loss"]) == [2, 3] and list(run.curves["grad_norm"]) == [1]


def test_evaluations_are_in_the_order_of_their_steps_and_damaged_ones_are_named(tmp_path):
    folder = write_run(tmp_path / "run")
    for step in (10, 0, 5):
        write_evaluation(folder, step, 0.5)
    for name, text in (
        ("step-1", "{"),
        ("step-2", "{}"),
        ("step-3", '{"sets": [3]}'),
        ("step-4", '{"sets": [{"name": "a", "main": "m", "metrics": {"m": null}}]}'),
        ("step-x", "{}"),
    ):
        (folder / "evaluation" / f"{name}.json").write_text(text)
    run = read_run(folder)
    assert list(run.evaluations) == [0, 5, 10]
    assert sorted(note.split()[0] for note in run.notes) == [f"evaluation/step-{step}.json" for step in (1, 2, 3, 4)]


def test_the_published_step_is_the_best_one_where_run_json_names_one(tmp_path):
    for name, best in (("last", {}), ("best", {"evaluation": {"verdict": "v", "step": 5}})):
        folder = write_run(tmp_path / name, steps=10, **best)
        write_evaluation(folder, 5, 0.5)
        write_evaluation(folder, 10, 0.25)
    assert read_run(tmp_path / "last").results()[0]["metrics"]["ndcg@10"] == 0.25
    assert read_run(tmp_path / "best").results()[0]["metrics"]["ndcg@10"] == 0.5


def test_an_older_run_has_no_names_of_data_sets(tmp_path):
    run = read_run(write_run(tmp_path / "run", starts=[{}], resolved={}))
    assert run.data_sets() == [
        {"name": "", "rows": "40", "fingerprint": "f1"},
        {"name": "", "rows": "8", "fingerprint": "f2"},
    ]
    assert run.flags["seed"] == 1


def test_what_is_no_run_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "checkpoint-2").mkdir()
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "none", "found no such folder"),
        (tmp_path / "empty", "found no run.json there"),
        (run / "run.json", "found a file"),
        (run / "checkpoint-2", f"its run is {run}"),
    ):
        with pytest.raises(UserError, match=message):
            read_run(folder)
    for text in ("{", "[]", "{}", '{"flags": {}, "starts": [3]}', '{"flags": {}, "evaluation": "x"}'):
        (run / "run.json").write_text(text)
        with pytest.raises(UserError, match=r"run\.json: "):
            read_run(run)


def test_a_checkpoint_belongs_to_the_run_around_it(tmp_path):
    run = write_run(tmp_path / "run")
    assert find_run(run)[1] is None and find_run(run)[0].name == "run"
    found, step = find_run(run / "checkpoint-2")
    assert found.name == "run" and step == 2
    assert find_run(tmp_path) == (None, None)
