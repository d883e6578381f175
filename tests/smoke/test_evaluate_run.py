"""`gritlm evaluate` of a real run: its checkpoint against its model, and what of the set it was trained on."""

import json
import os

import pytest
from helpers import run, train_flags, write_jsonl

from gritlm.evaluation.evaluate import main
from gritlm.training.train import main as train


@pytest.fixture(scope="module")
def trained(qwen3, tmp_path_factory):
    """A run of 6 steps on its own copy of the data."""
    folder = tmp_path_factory.mktemp("trained")
    write_jsonl(folder / "train.jsonl", rows=40, negatives=2, seed=5)
    flags = {"eval_strategy": "no", "learning_rate": 1e-2}
    assert train(train_flags(qwen3, folder / "train.jsonl", folder / "run", folder / "cache", **flags)) == 0
    return folder


def test_a_run_and_its_checkpoint(trained, tmp_path, capsys):
    """Of 12 queries and their 24 passages, 4 and 8 were trained on. Control: none of another set."""
    rows = [json.loads(line) for line in (trained / "train.jsonl").read_text().splitlines()]
    known = [row for number, row in enumerate(rows) if number % 10 and number % 6][:4]  # with texts of their own
    write_jsonl(tmp_path / "new.jsonl", rows=60, negatives=1, seed=99)
    others = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    new = [row for number, row in enumerate(others) if number % 10 and number % 6][:8]
    for name, part in (("some", [*known, *new]), ("new", new)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    checkpoint = trained / "run" / "checkpoint-3"
    command = [
        "-m",
        "gritlm",
        "evaluate",
        trained / "run",
        "--against",
        checkpoint,
        "--output_folder",
        tmp_path / "out",
    ]
    command += ["--benchmark", tmp_path / "some.jsonl", tmp_path / "new.jsonl"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    for model in (trained / "run", checkpoint):
        line = f"* some: 4 of 12 queries and 8 of 24 relevant passages are in the training data of {model}\n"
        assert line in done.stdout
    assert "* new" not in done.stdout and "\nsome*" in done.stdout and "\nnew " in done.stdout
    assert f"verdict: {checkpoint} -> {trained / 'run'}: nDCG@10 0." in done.stdout

    def again() -> str:
        assert main([str(word) for word in command[3:]]) == 0
        return capsys.readouterr().out

    kept = again()
    assert kept.count("read from") == 4
    assert kept.partition("retrieval ")[2] == done.stdout.partition("retrieval ")[2]
    os.rename(trained / "train.jsonl", trained / "moved.jsonl")
    assert again().count("is not there; whether it has seen the sets' texts is not known") == 2
    (trained / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    changed = again()
    assert f"{trained / 'run'}: its training data {trained / 'train.jsonl'} has changed since" in changed
    assert "* new: 8 of 8 queries and 16 of 16 relevant passages" in changed
