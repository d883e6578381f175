"""InfoNCE and its mask, against the formula written out, with a wrong variant that must differ."""

import math

import torch

from gritlm.evaluation import retrieval_metrics
from gritlm.losses import info_nce
from gritlm.objective import ContrastiveBatch, Objective, mask_candidates


def test_info_nce_is_the_formula():
    torch.manual_seed(0)
    q, p = torch.randn(3, 8), torch.randn(7, 8)
    positive = torch.tensor([2, 0, 6])
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 4] = True
    found = info_nce(q, p, positive, 0.5, mask)
    for b in range(3):
        scores = [float(q[b] @ p[j]) / 0.5 for j in range(7)]
        kept = [math.exp(s) for j, s in enumerate(scores) if not mask[b, j]]
        assert math.isclose(found[b], -math.log(math.exp(scores[positive[b]]) / sum(kept)), rel_tol=1e-5)
    assert not torch.allclose(found[1], info_nce(q, p, positive, 0.5)[1]), "control: the mask does nothing"


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
    masked = mask_candidates(ids, used, known, torch.tensor([0, 2, 3]))
    assert masked.tolist() == [
        [False, False, False, True, True, False],  # the other 10, and the unused slot
        [False, False, False, False, True, True],  # 21 is known for this query too
        [True, False, False, False, True, False],  # its own positive stays
    ]


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
