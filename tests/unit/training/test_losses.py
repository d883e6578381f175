"""InfoNCE and its mask, against the formula written out, with a wrong variant that must differ."""

import math

import pytest
import torch
from helpers import relative

from gritlm.evaluation.metrics import retrieval_metrics
from gritlm.training import losses
from gritlm.training.losses import info_nce
from gritlm.training.objective import MANY_KNOWN, ContrastiveBatch, Objective, mask_candidates


def test_info_nce_is_the_formula():
    torch.manual_seed(0)
    q, p = torch.randn(3, 8), torch.randn(7, 8)
    positive = torch.tensor([2, 0, 6])
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 4] = True
    found = info_nce(q, p, positive, 0.5, lambda b, p: mask[b, p])
    for b in range(3):
        scores = [float(q[b] @ p[j]) / 0.5 for j in range(7)]
        kept = [math.exp(s) for j, s in enumerate(scores) if not mask[b, j]]
        assert math.isclose(found[b], -math.log(math.exp(scores[positive[b]]) / sum(kept)), rel_tol=1e-5)
    assert not torch.allclose(found[1], info_nce(q, p, positive, 0.5)[1]), "control: the mask does nothing"


def dense(q, p, positive, temperature, mask):
    """The same from torch's own cross-entropy, all scores at once, in the dtype given."""
    mask = mask.scatter(1, positive[:, None], False)
    scores = (q @ p.T / temperature).masked_fill(mask, float("-inf"))
    return torch.nn.functional.cross_entropy(scores, positive, reduction="none")


@pytest.mark.parametrize("case", ["random", "nearly solved", "one tile", "all masked"])
def test_tiled_is_dense(case, monkeypatch):
    """Loss and both sides' gradients against float64, over several tiles; with a loss near 4e-4 too."""
    torch.manual_seed(0)
    if case != "one tile":
        monkeypatch.setattr(losses, "ROWS", 16)
        monkeypatch.setattr(losses, "COLUMNS", 24)
    q, p = (torch.nn.functional.normalize(torch.randn(n, 32), dim=1) for n in (50, 110))
    positive = torch.randperm(110)[:50]
    mask = torch.rand(50, 110) < 0.1
    if case == "nearly solved":
        p[positive] = torch.nn.functional.normalize(q + 0.05 * torch.randn(50, 32), dim=1)
    if case == "all masked":
        mask[7] = True
    upstream = torch.rand(50)
    temperature = 0.04 if case == "nearly solved" else 0.02
    results = []
    for function, dtype, options in (
        (info_nce, torch.float32, lambda b, c: mask[b, c]),
        (dense, torch.float64, mask),
    ):
        tensors = [x.detach().to(dtype).requires_grad_() for x in (q, p)]
        loss = function(*tensors, positive, temperature, options)
        results.append((loss.detach(), *torch.autograd.grad((loss * upstream.to(dtype)).sum(), tensors)))
    for found, truth in zip(*results, strict=True):
        assert torch.isfinite(found).all()
        assert relative(found.double(), truth) < 1e-5
    if case == "nearly solved":
        assert 1e-7 < results[1][0].mean() < 1e-3
        each = ((results[0][0].double() - results[1][0]).abs() / results[1][0]).max()
        assert each < 1e-4, "not only on the average"


def test_info_nce_is_float32_under_autocast():
    q, p = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(q, p, torch.arange(4), 0.02)
    assert found.dtype == torch.float32
    assert torch.allclose(found, info_nce(q.float(), p.float(), torch.arange(4), 0.02))


def test_identical_texts_are_not_negatives():
    ids = torch.tensor([10, 11, 20, 10, 30, 21])
    used = torch.tensor([True, True, True, True, False, True])
    known = torch.tensor([[10, 10], [20, 21], [10, 10]])
    assert mask_candidates(ids, used, known).tolist() == [
        [True, False, False, True, True, False],  # both 10s, and the unused slot
        [False, False, True, False, True, True],  # 21 is known for this query too
        [True, False, False, True, True, False],
    ]


def test_many_known_positives_are_masked_alike():
    ids, known = torch.randint(0, 400, (50,)), torch.randint(0, 400, (7, MANY_KNOWN + 1))
    used = torch.arange(50) % 5 > 0
    wanted = [[not use or text in row for text, use in zip(ids.tolist(), used, strict=True)] for row in known.tolist()]
    assert mask_candidates(ids, used, known).tolist() == wanted
    assert any(map(any, wanted)) and not all(map(all, wanted))


def test_an_unused_slot_changes_nothing():
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    known = torch.tensor([[1], [2]])

    def loss(slots, ids):
        batch = ContrastiveBatch(torch.tensor([0, 1]), torch.tensor(slots), torch.tensor(ids), known)
        return Objective(0.1)(vectors, batch)

    assert torch.allclose(loss([2, -1, 3, -1], [1, 0, 2, 0]), loss([2, 3], [1, 2]))
    assert not torch.allclose(loss([2, 4, 3, -1], [1, 5, 2, 0]), loss([2, 3], [1, 2]))


def test_retrieval_metrics_by_hand():
    corpus = torch.eye(12).numpy()
    queries = torch.zeros(2, 12)
    queries[0, [3, 5]] = torch.tensor([1.0, 0.9])  # relevant 5 comes second
    queries[1] = torch.linspace(1, 0, 12)  # relevant 11 comes last, 0 first
    found = retrieval_metrics(queries.numpy(), corpus, [{5}, {0, 11}])
    assert math.isclose(found["recall@1"], (0 + 0.5) / 2)
    assert math.isclose(found["recall@10"], (1 + 0.5) / 2)
    assert math.isclose(found["mrr@10"], (1 / 2 + 1) / 2)
    ideal = 1 + 1 / math.log2(3)
    assert math.isclose(found["ndcg@10"], (1 / math.log2(3) + 1 / ideal) / 2)
