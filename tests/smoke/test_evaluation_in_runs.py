"""Evaluations within a run: they change nothing that is learnt, go on after a kill, choose the model, end the run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import DRIVER, run, train, train_flags, write_jsonl
from safetensors.torch import load_file

from gritlm.evaluation.results import read_results
from gritlm.training.checkpoints import OPTIMIZER
from gritlm.training.run_folder import read_run_file
from gritlm.training.state_files import load_state


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("given") / "given.jsonl"
    write_jsonl(path, rows=30, negatives=2, seed=7)
    return path


def evaluations(out: Path) -> list[dict]:
    """What was logged of each evaluation, without its time."""
    entries = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    unlike = ("time", "eval_seconds")
    return [{k: v for k, v in entry.items() if k not in unlike} for entry in entries if "eval_mean" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_the_same_with_and_without(qwen3_dropout, data, given, tmp_path):
    """Bit for bit, with dropout. Rows that are held out change it: the control."""
    runs = {"without": {}, "with": {"eval_data": given, "eval_steps": 1}, "held": {"eval_held_out": 6, "eval_steps": 3}}
    for name, more in runs.items():
        train(*train_flags(qwen3_dropout, data, tmp_path / name, tmp_path / "cache", **more))
    learnt = {name: weights(tmp_path / name) for name in runs}
    assert same(learnt["with"], learnt["without"]) and not same(learnt["held"], learnt["without"])
    moments = [load_state(tmp_path / name / "checkpoint-6" / OPTIMIZER)["state"] for name in ("with", "without")]
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*(m.values() for m in moments), strict=True))
    logged = evaluations(tmp_path / "with")
    assert [entry["step"] for entry in logged] == list(range(7))
    assert len({entry["eval_given_map@100"] for entry in logged}) > 3, "the model changes"
    assert not evaluations(tmp_path / "without") and not (tmp_path / "without" / "evaluation").exists()
    assert all("eval_loss" in entry for entry in evaluations(tmp_path / "held"))
    times = [json.loads(line) for line in (tmp_path / "with" / "log.jsonl").read_text().splitlines()]
    shares = [sum(v for k, v in e.items() if k.startswith("time_share/")) for e in times if "loss" in e]
    assert shares == pytest.approx([1.0] * 6, abs=1e-3), "an evaluation is no part of a step"


def test_stopped_killed_within_an_evaluation_and_resumed(qwen3_dropout, data, given, tmp_path):
    """The same weights, evaluations, schedule and verdict as of a run that nothing disturbs, bit for bit."""
    more = {
        "eval_data": given,
        "eval_held_out": 6,
        "eval_steps": 1,
        "max_steps": 8,
        "save_steps": 2,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": '{"patience": 0, "factor": 0.5}',
        "early_stopping_patience": 20,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_given_map@100",
    }

    def go(name: str, fault: str):
        flags = train_flags(qwen3_dropout, data, tmp_path / name, tmp_path / "cache", **more)
        return run(DRIVER, tmp_path / "rows", fault, *flags)

    whole = go("whole", "-")
    assert whole.returncode == 0, whole.stderr[-3000:]
    stopped = go("cut", "stop:2")
    assert stopped.returncode == 0 and "stopped by a signal after step 3" in stopped.stdout
    assert "verdict" not in stopped.stdout and "evaluation" not in read_run_file(tmp_path / "cut")
    assert go("cut", "kill_evaluating:7").returncode != 0
    assert sorted(p.name for p in (tmp_path / "cut" / "evaluation").iterdir())[-1] == "step-6.json"
    resumed = go("cut", "-")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "evaluation at step 0" in stopped.stdout and "evaluation at step 0" not in resumed.stdout, "it is read"

    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    logged = evaluations(tmp_path / "whole")
    assert [entry["step"] for entry in logged] == list(range(9)) and evaluations(tmp_path / "cut") == logged
    rates = [json.loads(line).get("learning_rate") for line in (tmp_path / "whole" / "log.jsonl").open()]
    assert len({rate for rate in rates if rate}) > 2, "the schedule has followed the metric"
    states = [
        json.loads((tmp_path / name / "checkpoint-8" / "trainer_state.json").read_text()) for name in ("whole", "cut")
    ]
    for key in ("best_metric", "best_global_step"):
        assert states[0][key] == states[1][key] is not None
    counts = [state["stateful_callbacks"]["EarlyStopping"] for state in states]
    assert counts[0] == counts[1] and counts[0]["attributes"]["early_stopping_patience_counter"] > 0
    verdicts = [read_run_file(tmp_path / name)["evaluation"] for name in ("whole", "cut")]
    assert verdicts[0] == verdicts[1] and verdicts[0]["step"] == states[0]["best_global_step"]
    assert f"verdict: {verdicts[0]['verdict']}" in resumed.stdout


def test_the_best_model_is_published_and_the_run_ends_early(qwen3, data, tmp_path):
    """At a rate that makes evaluations worse after a few steps. The control has no patience; its last model counts."""
    common = {"eval_held_out": 8, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "max_steps": 12}
    early = {"early_stopping_patience": 2, "load_best_model_at_end": True}

    def go(name: str, **more) -> tuple[Path, str]:
        flags = train_flags(qwen3, data, tmp_path / name, tmp_path / "cache", learning_rate=0.03, **common, **more)
        return tmp_path / name, train(*flags).stdout

    control, _ = go("control")
    means = [entry["eval_mean"] for entry in evaluations(control)]
    stop = next(i for i in range(3, 13) if max(means[1 : i + 1]) == max(means[1 : i - 1]))  # two without a better one
    best = 1 + means[1:stop].index(max(means[1:stop]))
    assert best < stop < 12, "later evaluations are worse"
    assert same(weights(control), weights(control / "checkpoint-12"))
    assert read_run_file(control)["evaluation"]["step"] == 12

    out, said = go("early", **early)
    assert [entry["step"] for entry in evaluations(out)] == list(range(stop + 1))
    assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{best}", f"checkpoint-{stop}"}
    assert same(weights(out), weights(out / f"checkpoint-{best}"))
    assert not same(weights(out), weights(out / f"checkpoint-{stop}"))
    assert f"best model: step {best}, eval_mean {max(means[1:stop]):.4f}" in said
    entry = read_run_file(out)["evaluation"]
    assert (entry["base"], entry["step"]) == (0, best) and entry["verdict"] in said

    for name in ("modules.json", "model.safetensors"):  # as if it had been killed while it published
        (out / name).unlink()
    (out / "run.json").write_text((out / "run.json").read_text().replace('"finished": true', '"finished": false'))
    again = go("early", **early)[1]
    assert "evaluation at step" not in again and entry["verdict"] in again
    assert same(weights(out), weights(out / f"checkpoint-{best}"))


def test_only_before_and_after_and_where_each_is_missing(qwen3, data, given, tmp_path):
    def go(name: str, **more) -> str:
        flags = train_flags(qwen3, data, tmp_path / name, tmp_path / "cache", eval_data=given, max_steps=3, **more)
        return train(*flags).stdout

    said = go("ends", eval_strategy="no")
    assert [entry["step"] for entry in evaluations(tmp_path / "ends")] == [0, 3]
    assert "verdict: nDCG@10 " in said and "evaluation: before the first step, after the last step" in said
    assert "verdict: none: the base was not evaluated by this run" in go("later", eval_on_start=False)

    results = read_results(tmp_path / "ends" / "evaluation" / "step-3.json")
    assert results.about["step"] == 3 and results.about["contract"]["query_max_len"] == 32
    logged = evaluations(tmp_path / "ends")[-1]
    assert results.sets[0].metrics["ndcg@10"] == logged["eval_given_ndcg@10"] == logged["eval_mean"]


def test_a_run_that_goes_on_from_another_folder_has_its_base(qwen3, data, given, tmp_path):
    """And the other folder's best checkpoint; here the worst counts as the best."""
    more = {"eval_data": given, "eval_steps": 1, "save_steps": 1, "save_total_limit": 0, "learning_rate": 0.03}
    more |= {"load_best_model_at_end": True, "metric_for_best_model": "given_map@100", "greater_is_better": False}
    first = train_flags(qwen3, data, tmp_path / "first", tmp_path / "cache", **more)
    train(*first)
    values = [entry["eval_given_map@100"] for entry in evaluations(tmp_path / "first")][1:]
    best = 1 + values.index(min(values))
    assert best < 5
    shutil.rmtree(tmp_path / "first" / "checkpoint-6")
    second = train_flags(qwen3, data, tmp_path / "second", tmp_path / "cache", **more)
    said = train(*second, "--resume_from_checkpoint", str(tmp_path / "first" / "checkpoint-5")).stdout
    assert "verdict: nDCG@10" in said
    assert read_run_file(tmp_path / "second")["evaluation"]["step"] == best
    assert same(weights(tmp_path / "first" / f"checkpoint-{best}"), weights(tmp_path / "first"))
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))
