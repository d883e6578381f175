import json

import pytest

from gritlm.evaluation.models import Model
from gritlm.evaluation.trained_on import find_training_data, trained_tasks, training_sets


def write_run(folder, data, base, **more):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"flags": {"train_data": str(data), "model_name_or_path": str(base)}} | more
    (folder / "run.json").write_text(json.dumps(content))
    return folder


def test_the_sets_of_a_model_and_of_its_bases(tmp_path):
    for name in ("first/fiqa.jsonl", "second/nq-train.jsonl", "second/fiqa.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"query": "a", "pos": ["b"], "neg": []}\n')
    base = write_run(tmp_path / "base", tmp_path / "first", "Qwen/Qwen3-0.6B")
    tuned = write_run(tmp_path / "tuned", "second", base, starts=[{"folder": str(tmp_path)}])
    assert training_sets(tuned) == (["fiqa", "nq-train"], "Qwen/Qwen3-0.6B", "")
    (tuned / "checkpoint-3").mkdir()
    assert training_sets(tuned / "checkpoint-3")[0] == ["fiqa", "nq-train"]
    (tmp_path / "bare").mkdir()
    assert "bare: found no run.json" in training_sets(tmp_path / "bare")[2]
    gone = write_run(tmp_path / "gone", tmp_path / "nowhere", "x")
    assert "nowhere" in training_sets(gone)[2]
    (gone / "run.json").write_text("{")
    assert "not known" in training_sets(gone)[2]
    records, (note,) = find_training_data(Model("gone", gone, {"kind": "gritlm"}))
    assert not records and "no JSON" in note and "not known" in note, "an evaluation goes on"


@pytest.mark.parametrize(
    ("name", "task", "why"),
    [
        ("SciFact", "SciFact", "the same name"),
        ("scifact", "SciFact", "the same name"),
        ("fiqa_train", "FiQA2018", "a similar name"),
        ("quora", "QuoraRetrieval", "a similar name"),
        ("nq", "NanoNQRetrieval", "a similar name"),
        ("msmarco", "MSMARCO", "the same name"),
        ("allnli", "XNLI", "a similar name"),  # by the table
    ],
)
def test_tasks_by_the_names_of_sets(name, task, why):
    assert trained_tasks([task, "STS12"], [name], None) == {task: f"trained on {name}, {why}"}


def test_control_other_names_mark_nothing():
    tasks = ["SciFact", "FiQA2018", "STS12", "MSMARCO"]
    assert trained_tasks(tasks, ["python-docs", "train", "my queries"], None) == {}
    assert trained_tasks(tasks, [], None) == {}


def test_what_mteb_knows_of_the_base_is_marked():
    assert "MSMARCO" in trained_tasks(["MSMARCO", "STS12"], ["other"], "intfloat/e5-base-v2")
