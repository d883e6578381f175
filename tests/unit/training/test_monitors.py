"""Means of the loss since the last log line, and the first step that is not finite."""

import pytest
import torch

from gritlm.errors import UserError
from gritlm.training.monitors import FiniteWatch, LossMeter


def test_the_meter_gives_means_by_term_and_by_data_set():
    meter = LossMeter()
    for value, dataset in ((1.0, "nq"), (3.0, "nq"), (8.0, "squad")):
        meter.add({"info_nce": torch.tensor(value), "spread_out": torch.tensor(0.5)}, dataset)
    assert meter.read() == {"info_nce": 4.0, "spread_out": 0.5, "loss/nq": 2.5, "loss/squad": 8.5}
    assert meter.read() == {}, "it starts anew"


@pytest.mark.parametrize("eager", [True, False])
def test_the_first_step_that_is_not_finite_is_named(eager):
    watch = FiniteWatch(torch.device("cpu"))
    watch.eager = False
    for step, loss in enumerate((1.0, float("nan"), float("nan")), start=1):
        watch.loss(step, torch.tensor(loss), "nq", [f"nq:{step}"])
        watch.gradient_norm(step, torch.tensor(loss))
    with pytest.raises(UserError, match="step 2: the loss is nan; data set nq, rows nq:2"):
        watch.check()
    healthy = FiniteWatch(torch.device("cpu"))
    healthy.eager = eager
    healthy.loss(1, torch.tensor(1.0), "nq", ["nq:1"])
    healthy.gradient_norm(1, torch.tensor(2.0))
    healthy.check()
