"""The average of the weights is what its formula says, and is in the model only while it is asked for."""

import pytest
import torch
from torch import nn

from gritlm.training.weight_average import WeightAverage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_and_its_place(dtype):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).to(dtype)
    model.bias.requires_grad_(False)
    average, wanted = WeightAverage(model, 0.5), model.weight.detach().double()
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.add_(torch.randn(3, 5).to(dtype))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * model.weight.detach().double()
    trained, place = model.weight.detach().clone(), model.weight.data_ptr()
    assert not torch.allclose(trained.double(), wanted), "control"
    with average.in_place():
        assert model.weight.dtype == torch.float32
        assert torch.allclose(model.weight.detach().double(), wanted, atol=1e-6)
        assert len(average.weights) == 1, "what is frozen has no average"
    assert torch.equal(model.weight, trained) and model.weight.data_ptr() == place
    average.restore([trained + 1])
    assert torch.equal(model.weight, trained + 1)
