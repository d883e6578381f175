"""The flags of an evaluation: what is refused in one line, what follows from what, what a resumed run may change."""

import json

import pytest
import torch
from helpers import train_flags, write_jsonl
from test_arguments import as_list

from gritlm.data.records import load_records
from gritlm.errors import UserError
from gritlm.evaluation.sets import RetrievalSet
from gritlm.training.evaluation_data import gather_evaluation_data, given_sets
from gritlm.training.flag_checks import parse
from gritlm.training.rehearsal import build_optimizer, schedule
from gritlm.training.run_folder import run_settings_of
from gritlm.training.setup import make_plan

NOTHING = "found nothing to evaluate on; add --eval_data PATH, or --eval_held_out ROWS"
HELD = {"eval_held_out": 4}
REFUSED = {
    "steps": ({"eval_steps": 5}, f"--eval_steps 5.0: {NOTHING}"),
    "strategy": ({"eval_strategy": "epoch"}, f"--eval_strategy epoch: {NOTHING}"),
    "do_eval": ({"do_eval": True}, f"--do_eval True: {NOTHING}"),
    "delay": ({"eval_delay": 2}, f"--eval_delay 2.0: {NOTHING}"),
    "best": ({"load_best_model_at_end": True}, f"--load_best_model_at_end True: {NOTHING}"),
    "metric": ({"metric_for_best_model": "loss"}, f"--metric_for_best_model loss: {NOTHING}"),
    "greater": ({"greater_is_better": True}, f"--greater_is_better True: {NOTHING}"),
    "early": ({"early_stopping_patience": 2}, f"--early_stopping_patience 2: {NOTHING}"),
    "save best": ({"save_strategy": "best"}, f"--save_strategy best: {NOTHING}"),
    "plateau": ({"lr_scheduler_type": "reduce_lr_on_plateau"}, f"--lr_scheduler_type reduce_lr_on_plateau: {NOTHING}"),
    "patience": (HELD | {"early_stopping_patience": 0}, "--early_stopping_patience: found 0, wanted a number above 0"),
    "threshold": (HELD | {"early_stopping_threshold": 0.1}, "has no effect without --early_stopping_patience"),
    "never": (HELD | {"eval_strategy": "no", "early_stopping_patience": 1}, "--eval_strategy no: found a flag that"),
    "unsaved": (HELD | {"load_best_model_at_end": True, "save_strategy": "no"}, "the best model would not be saved"),
    "unlike": (HELD | {"load_best_model_at_end": True, "save_strategy": "epoch"}, "save and eval strategy to match"),
    "greedy": (HELD | {"lr_scheduler_type": "greedy"}, "reduce_lr_on_plateau follows the evaluations"),
    "direction": (
        HELD | {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": '{"mode": "min"}'},
        "found mode min, wanted max: a greater --metric_for_best_model eval_mean is better",
    ),
    "option": (
        HELD | {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": '{"patient": 1}'},
        "--lr_scheduler_type reduce_lr_on_plateau with --lr_scheduler_kwargs",
    ),
    "warm-up": (
        HELD | {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 5},
        "--warmup_steps 5.0: --lr_scheduler_type reduce_lr_on_plateau has no warm-up",
    ),
    "half steps": (HELD | {"eval_steps": 1.5}, "--eval_steps: found 1.5"),
    "no rows": ({"eval_held_out": -1}, "--eval_held_out: found -1, wanted 0 or more"),
    "no path": ({"eval_data": "absent"}, "--eval_data: found no such file or folder among ['absent']"),
}


@pytest.fixture
def flags(tmp_path) -> dict:
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    return {
        "model_name_or_path": tmp_path,
        "train_data": tmp_path / "data.jsonl",
        "output_dir": tmp_path / "out",
        "use_cpu": True,
    }


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(flags, name):
    change, message = REFUSED[name]
    with pytest.raises(UserError) as error:
        parse(as_list(flags | change))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_follows_from_what(flags):
    none, held = parse(as_list(flags)).training, parse(as_list(flags | HELD)).training
    assert (none.eval_strategy, none.eval_on_start) == ("no", False)
    assert (held.eval_strategy, held.eval_on_start, held.eval_steps) == ("steps", True, 0.1)
    assert held.metric_for_best_model is None
    best = parse(as_list(flags | HELD | {"load_best_model_at_end": True})).training
    assert (best.metric_for_best_model, best.greater_is_better) == ("eval_mean", True)
    loss = parse(as_list(flags | HELD | {"metric_for_best_model": "loss"})).training
    assert loss.greater_is_better is False


def test_the_plateau_knows_which_way_is_up(flags):
    for metric, mode in (("eval_mean", "max"), ("eval_loss", "min")):
        more = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": metric}
        args = parse(as_list(flags | HELD | more)).training
        assert args.lr_scheduler_kwargs == {"mode": mode}
        assert schedule(args, 100)(50) == 1.0
        assert isinstance(build_optimizer(args), torch.optim.Optimizer)


def settings(flags: list[str]) -> dict:
    run = parse(flags)
    return run_settings_of(run, load_records(run.data.train_data, run.data.data_cache), 1, given_sets(run))


def test_what_a_resumed_run_may_change(qwen3, data, tmp_path):
    """Anything about evaluations, unless their results decide what is learnt."""
    write_jsonl(tmp_path / "other.jsonl", rows=9, negatives=0, seed=9)

    def differing(before: dict, now: dict) -> set[str]:
        one, other = (
            settings(train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", **more)) for more in (before, now)
        )
        return {name for name in one | other if one.get(name) != other.get(name)}

    free = {"eval_data": tmp_path / "other.jsonl", "eval_steps": 2, "eval_delay": 1, "eval_on_start": False}
    assert differing({}, free) == set()
    assert differing({}, {"eval_held_out": 3}) == {"eval_held_out"}
    held = {"eval_held_out": 3, "early_stopping_patience": 2}
    assert differing(held, held | free) == {"eval_steps", "eval_delay", "evaluation sets"}
    assert differing(held, held | {"early_stopping_patience": 3}) == {"early_stopping_patience"}


def plan_of(*flags: str):
    run = parse(list(flags))
    records = load_records(run.data.train_data, run.data.data_cache)
    plan = make_plan(run, records)
    return gather_evaluation_data(run, plan, records, given_sets(run))


def test_a_metric_that_no_set_gives(qwen3, data, tmp_path):
    def flags(metric: str) -> list[str]:
        more = {"eval_held_out": 6, "metric_for_best_model": metric}
        return train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", **more)

    for metric in ("eval_mean", "mean", "loss", "eval_plain_held_out_ndcg@10", "hard_held_out_map@100"):
        plan_of(*flags(metric))
    with pytest.raises(UserError) as error:
        plan_of(*flags("eval_ndcg@10"))
    wanted = "--metric_for_best_model eval_ndcg@10: found no such metric, wanted one of eval_mean, eval_loss, eval_hard"
    assert str(error.value).startswith(wanted)


def test_a_loss_that_an_evaluation_does_not_have(qwen3, data, tmp_path):
    """Where only a teacher's vectors train; with InfoNCE, or in one of two data sets, there is one."""
    samples, teacher = tmp_path / "samples.json", {"teacher_vectors": "teacher", "eval_held_out": 6}

    def planned(settings: dict, **more):
        samples.write_text(json.dumps(settings))
        more = teacher | {"num_samples": samples} | more
        return plan_of(*train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", **more))

    alone = {"contrastive_weight": 0, "teacher_weight": 1}
    found = planned({}, **alone)
    assert not found.loss_batches and "eval_loss" not in found.metrics and found.sets
    for metric in ("loss", "eval_loss"):
        with pytest.raises(UserError, match=f"--metric_for_best_model {metric}: found no loss of the held-out"):
            planned({}, metric_for_best_model=metric, **alone)
    one = {"train_group_size": 1, "teacher_weight": 1}
    assert not planned({}, **one | {"eval_held_out": 1}).loss_batches, "one row that nothing is contrasted with"
    assert planned({}, **one).loss_batches, "control: six rows"
    some = planned({"plain": alone}, metric_for_best_model="loss")
    assert {number for batch in some.loss_batches for number, _ in batch} == {0}, "the other data set's rows"
    both = planned({}, teacher_weight=1, metric_for_best_model="loss")
    assert {number for batch in both.loss_batches for number, _ in batch} == {0, 1}, "control"


def test_held_out_rows_that_cannot_be(qwen3, data, tmp_path):
    def refusal(**more) -> str:
        with pytest.raises(UserError) as error:
            plan_of(*train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", **more))
        return str(error.value)

    assert "--eval_held_out 40: found 40 rows in data set hard, wanted more than that" in refusal(eval_held_out=40)
    samples = tmp_path / "samples.json"
    samples.write_text('{"hard": 0}')
    more = {"eval_held_out": 40, "num_samples": samples, "global_batch_size": 2}
    used = plan_of(*train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", **more))
    assert [found.name for found in used.sets] == ["plain_held_out"]
    same = tmp_path / "hard_held_out.jsonl"
    write_jsonl(same, rows=5, negatives=0, seed=3)
    assert "found two sets with the name hard_held_out" in refusal(eval_held_out=4, eval_data=same)


def test_texts_that_are_trained_on_are_counted(qwen3, data, tmp_path):
    """3 of 5 queries: a query, one under another instruction, and a positive; not those that are held out."""
    rows = [json.loads(line) for line in (data / "plain.jsonl").read_text().splitlines()][30:]
    lines = [
        {"query": rows[1]["query"], "pos": ["some answer"]},
        {"query": ["Another instruction: ", rows[2]["query"][1]], "pos": ["another answer"]},
        {"query": rows[3]["pos"][1], "pos": ["a third answer"]},
        {"query": "never seen before", "pos": ["a fourth answer"]},
        {"query": "nor this one", "pos": ["a fifth answer"]},
    ]
    path = tmp_path / "given.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", eval_data=path)
    assert plan_of(*flags).warnings[-1] == (
        "given: 3 of 5 queries and 0 of 5 relevant passages are in the training data"
    )
    path.write_text("\n".join(map(json.dumps, lines[3:])))
    assert "training data" not in str(plan_of(*flags).warnings), "control"
    more = {"eval_held_out": 8, "eval_data": path}
    (held, *_) = plan_of(*train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", **more)).sets[1:]
    assert isinstance(held, RetrievalSet)
    path.write_text("\n".join(json.dumps({"query": text, "pos": ["some answer"]}) for text in held.queries))
    assert "training data" in str(plan_of(*flags).warnings)
    assert "training data" not in str(
        plan_of(*train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", **more)).warnings
    ), "they are held out"
