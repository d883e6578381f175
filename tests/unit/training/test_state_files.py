"""Training state goes to a file and comes back exactly, and nothing in the file is unpickled."""

import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import Adafactor

from gritlm.errors import UserError
from gritlm.training.state_files import load_state, random_states, restore_random_states, save_state

ADAFACTOR = partial(Adafactor, lr=1e-3, relative_step=False, scale_parameter=False)


def assert_equal(one, other) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, torch.Tensor | np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    else:
        assert one == other


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9), torch.optim.Adagrad, ADAFACTOR]
)
@pytest.mark.parametrize("schedule", ["cosine", "linear", "inverse_sqrt", "constant"])
def test_a_state_comes_back_as_it_was(make, schedule, tmp_path):
    layer = torch.nn.Linear(3, 2)
    optimizer = make(layer.parameters())
    scheduler = get_scheduler(schedule, optimizer, 2, 9)
    for _ in range(3):
        layer(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    for state in (optimizer.state_dict(), scheduler.state_dict()):
        save_state(state, tmp_path / "state.safetensors")
        assert_equal(load_state(tmp_path / "state.safetensors"), state)


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw() -> list:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(3).tolist()]

    device = torch.device("cpu")
    random.gauss(0, 1)  # a state with the second number of a pair
    np.random.normal()
    save_state(random_states(device), tmp_path / "state.safetensors")
    drawn = draw()
    assert draw() != drawn
    restore_random_states(load_state(tmp_path / "state.safetensors"), device)
    assert draw() == drawn


def test_what_is_no_state_of_ours_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(UserError, match="found a set, which no checkpoint can hold"):
        save_state({"a": {1}}, path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="the file is damaged"):
        load_state(path)
    save_state({"a": torch.ones(9)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="the file is damaged"):
        load_state(path)
