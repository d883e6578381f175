"""Contestants take the same step, choose their fastest setting, and report a process that was killed."""

import os
import signal
import time
from argparse import Namespace
from functools import partial

import pytest
import torch

from gritlm.benchmark.contestants import (
    Contestant,
    GritLMStep,
    Implementation,
    choose_fastest,
    gradient_difference,
    save_gradient,
    time_step,
)
from gritlm.benchmark.workload import Workload, make_workload, write_rows
from gritlm.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Small operators on several threads take many times as long when other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [(f"find the number {n} times {n}", f"def f{n}(x):\n    return {n} * x") for n in range(50)]
    write_rows(file, pairs, rows=8, group=3, uniform=False)
    args = Namespace(lengths=str(file), max_len=16, queries=4, group=3, model="tiny", bf16=False)
    with make_workload(args) as workload:
        workload.save_served()
        yield workload


def build_baseline(workload: Workload) -> Implementation:
    from gritlm.benchmark.sentence_transformers import build_step  # here: the other tests need not wait for its import

    return build_step(workload)


BUILDS = {
    "kept": GritLMStep("packed", "1", 32).build,
    "padded": GritLMStep("sdpa", "0", 32).build,
    "checkpointed": GritLMStep("packed", "0", 32, checkpointing="full").build,
    "selectively checkpointed": GritLMStep("packed", "8", 32, checkpointing="selective").build,
    "the baseline": build_baseline,
}


def test_every_implementation_takes_the_same_step(workload, tmp_path):
    first = GritLMStep("packed", "0", 10_000).build(workload)
    timing = time_step(first)
    assert set(timing.parts) == {"data", "pass_1", "loss", "pass_2"}
    assert 0 < sum(timing.parts.values()) <= timing.seconds
    save_gradient(first, tmp_path / "gradient")
    for name, build in BUILDS.items():
        implementation = build(workload)
        loss = time_step(implementation).loss
        assert loss == pytest.approx(timing.loss, abs=1e-5), name
        assert gradient_difference(implementation, tmp_path / "gradient") < 1e-5, name
    with torch.no_grad():
        first.model.backbone.layers[0].mlp.up_proj.weight.mul_(1.1)
    time_step(first)
    assert gradient_difference(first, tmp_path / "gradient") > 1e-3, "control: another model"


@pytest.mark.parametrize("term", ["cosent", "guide", "teacher", "matryoshka"])
def test_every_term_can_be_a_contestant(workload, term):
    implementation = GritLMStep("packed", "0", 10_000, term=term).build(workload)
    timing, first = time_step(implementation), time_step(GritLMStep("packed", "0", 10_000).build(workload))
    assert implementation.gradient().isfinite().all() and timing.loss > 0
    assert abs(timing.loss - first.loss) > 1e-4, "it is another loss"


def sleeping_step(seconds: float):
    if seconds == float("inf"):
        raise torch.OutOfMemoryError
    time.sleep(seconds)
    return torch.tensor(seconds), {}


def build_sleeping(workload) -> Implementation:
    seconds = {"slow": 0.1, "fast": 0.0, "too large": float("inf")}
    return Implementation(torch.nn.Linear(1, 1), {name: partial(sleeping_step, s) for name, s in seconds.items()}, CPU)


def test_the_fastest_setting_is_chosen():
    implementation = build_sleeping(None)
    assert time_step(implementation).loss == pytest.approx(0.1), "control: the first is the default"
    best, seconds = choose_fastest(implementation)
    assert (best, seconds["too large"]) == ("fast", float("inf")) and seconds["slow"] >= 0.1
    assert time_step(implementation).loss == 0.0


def process_id(implementation: Implementation) -> int:
    return os.getpid()


def die(implementation: Implementation) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_reported(workload):
    contestant = Contestant("large", build_sleeping, workload)
    try:
        contestant.wait_until_built()
        assert contestant.ask(process_id) != os.getpid()
        with pytest.raises(UserError, match="large: its process was killed: out of memory"):
            contestant.ask(die)
    finally:
        contestant.close()
