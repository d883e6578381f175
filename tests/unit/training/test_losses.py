"""The tiled log-sum-exp against torch's in float64: value and all three gradients, over several tiles."""

import pytest
import torch
from helpers import relative

from gritlm.training import losses
from gritlm.training.losses import EMPTY, Ring, logsumexp_over

TEMPERATURE = 0.02


def dense(queries, candidates, shift, mask):
    """All scores at once, in the dtype given."""
    logits = (queries @ candidates.T - shift[:, None]) / TEMPERATURE
    return torch.logsumexp(logits.masked_fill(mask, float("-inf")), dim=1).clamp(min=EMPTY)


def tiled(queries, candidates, shift, mask, ring=None):
    return logsumexp_over(queries, candidates, shift, TEMPERATURE, lambda b, p: mask[b, p], ring)


def value_and_gradients(function, tensors, mask, upstream):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    value = function(*tensors, mask)
    gradients = torch.autograd.grad((torch.nn.functional.softplus(value) * upstream).sum(), tensors)
    return [torch.nn.functional.softplus(value).detach(), *gradients]


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    queries, candidates = (torch.nn.functional.normalize(torch.randn(n, 32), dim=1) for n in (50, 110))
    return queries, candidates, 0.5 * torch.rand(50)


@pytest.mark.parametrize("case", ["random", "one tile", "nearly solved", "all masked"])
def test_tiled_equals_dense(vectors, case, monkeypatch):
    if case != "one tile":
        monkeypatch.setattr(losses, "TILE_ROWS", 16)
        monkeypatch.setattr(losses, "TILE_COLUMNS", 24)
    queries, candidates, shift = vectors
    mask, upstream = torch.rand(50, 110) < 0.1, torch.rand(50)
    if case == "nearly solved":
        shift = shift + 0.9
    if case == "all masked":
        mask[7] = True
    found = value_and_gradients(tiled, (queries, candidates, shift), mask, upstream)
    doubles = [x.double() for x in (queries, candidates, shift)]
    wanted = value_and_gradients(dense, doubles, mask, upstream.double())
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        assert relative(one.double(), other) < 1e-6 * (5 if case == "nearly solved" else 1)
    if case == "nearly solved":
        assert 1e-12 < wanted[0].mean() < 1e-3
        assert ((found[0].double() - wanted[0]).abs() / wanted[0]).max() < 1e-4, "not only on the average"
    if case == "all masked":
        assert found[0][7] == 0 and not found[1][7].any(), "no candidate, no loss and no gradient"
    (without_mask, *_) = value_and_gradients(tiled, (queries, candidates, shift), torch.zeros_like(mask), upstream)
    assert relative(without_mask, found[0]) > 1e-3, "control: the mask does nothing"


def test_a_ring_of_blocks_equals_all_candidates(vectors):
    """Three blocks that arrive one after the other; their gradient comes home with them."""
    queries, candidates, shift = vectors
    blocks = candidates[:108].view(3, 36, 32)
    mask, upstream = torch.rand(50, 108) < 0.1, torch.rand(50)

    class Carousel:
        """The other ranks of the ring: what is sent on comes back after three shifts."""

        def __init__(self):
            self.sent: list[torch.Tensor] = []

        def shift(self, block):
            self.sent.append(block.clone())
            return blocks[len(self.sent) % 3]

    def ringed(q, c, s, m):
        return tiled(q, c, s, m, Ring(3, Carousel().shift))

    (value, *_) = value_and_gradients(ringed, (queries, blocks[0], shift), mask, upstream)
    (wanted, *_) = value_and_gradients(tiled, (queries, candidates[:108], shift), mask, upstream)
    assert torch.allclose(value, wanted, atol=1e-5)


def test_it_is_float32_under_autocast(vectors):
    halves = [x.bfloat16() for x in vectors]
    mask = torch.zeros(50, 110, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        found = tiled(*halves, mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, tiled(*(x.float() for x in halves), mask))
