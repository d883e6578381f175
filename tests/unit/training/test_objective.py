"""Every row of TERMS against its formula, written apart in float64 with loops over queries and candidates."""

import inspect
import math

import pytest
import torch
from helpers import relative
from sentence_transformers.losses import MultipleNegativesRankingLoss

from gritlm.data.batches import ContrastiveBatch
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.objective import MANY_KNOWN, TERMS, Objective, is_known

TEMPERATURE, QUERIES, GROUP = 0.05, 8, 3
# Query 3 is query 2 once more. The positive of query 4 is known to answer query 5. Passage text 0 appears three times.
# After the cut, query 7 is query 4. Texts 20 and 7 are then text 19, query 7's positive, and text 17 is text 1.
QUERY_IDS = [100, 101, 102, 102, 104, 105, 106, 104]
SLOT_IDS = [0, 1, 2, 3, 0, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 13, 14, 15, 16, 17, 18, 19, 20, 21]
UNUSED = (5, 23)
AFTER_THE_CUT = {20: 19, 7: 19, 17: 1}
KNOWN = [[0, 0], [3, 3], [5, 8], [5, 8], [11, 11], [13, 11], [16, 16], [19, 19]]


def tokens_of(text: int) -> int:
    return 1000 + AFTER_THE_CUT.get(text, text)


def batch(query_ids=QUERY_IDS, slot_ids=SLOT_IDS, unused=UNUSED, known=KNOWN, cut=tokens_of) -> ContrastiveBatch:
    slots = [-1 if slot in unused else len(query_ids) + slot for slot in range(len(slot_ids))]
    return ContrastiveBatch(
        torch.arange(len(query_ids)),
        torch.tensor(slots),
        torch.tensor(query_ids),
        torch.tensor(slot_ids),
        torch.tensor([0 if slot in unused else cut(text) for slot, text in enumerate(slot_ids)]),
        torch.tensor(known),
    )


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(QUERIES * (1 + GROUP), 16), dim=1)


def flags(name: str, **more) -> ObjectiveArguments:
    return ObjectiveArguments(temperature=TEMPERATURE, **TERMS[name].example, **more)


# ---- the formulas


def others(query: int) -> list[int]:
    """Slots that are used and hold no known positive of the query."""
    used = [s for s in range(QUERIES * GROUP) if s not in UNUSED and SLOT_IDS[s] not in KNOWN[query]]
    return [s for s in used if tokens_of(SLOT_IDS[s]) not in positives(query)]


def positives(query: int) -> set[int]:
    """The tokens of the positives of the query and of its equals."""
    return {tokens_of(SLOT_IDS[other * GROUP]) for other in range(QUERIES) if QUERY_IDS[other] == QUERY_IDS[query]}


def info_nce(q, slots, query: int, extra: tuple = ()):
    """`-log( exp(s+/t) / (exp(s+/t) + sum of exp(s/t)) )`."""
    own = (q[query] @ slots[query * GROUP] / TEMPERATURE).exp()
    scores = [(q[query] @ slots[s] / TEMPERATURE).exp() for s in others(query)]
    return -torch.log(own / (own + sum(scores) + sum(extra)))


def same_tower(q, slots, query: int):
    extra = []
    for other in range(QUERIES):
        related = set(KNOWN[other]) & set(KNOWN[query])
        if QUERY_IDS[other] != QUERY_IDS[query] and not related:
            extra.append((q[query] @ q[other] / TEMPERATURE).exp())
    for s in others(query):
        if QUERY_IDS[s // GROUP] != QUERY_IDS[query]:
            extra.append((slots[query * GROUP] @ slots[s] / TEMPERATURE).exp())
    return info_nce(q, slots, query, tuple(extra))


FORMULAS = {"info_nce": info_nce, "same_tower": same_tower}


def dense(name: str, vectors):
    return sum(FORMULAS[name](vectors[:QUERIES], vectors[QUERIES:], query) for query in range(QUERIES)) / QUERIES


def loss_and_gradient(function, vectors):
    vectors = vectors.clone().requires_grad_()
    loss = function(vectors)
    return loss.detach(), torch.autograd.grad(loss, vectors)[0]


def test_every_term_has_a_formula():
    assert FORMULAS.keys() == TERMS.keys()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_term_is_its_formula(vectors, name, dtype):
    vectors = vectors.to(dtype)
    objective = Objective(flags(name))
    found = loss_and_gradient(lambda v: sum(objective(v.float(), batch()).values()), vectors.float())
    wanted = loss_and_gradient(lambda v: dense(name, v), vectors.double())
    assert list(objective(vectors.float(), batch())) == [name]
    assert relative(found[0].double(), wanted[0]) < 1e-6
    assert relative(found[1].double(), wanted[1]) < 1e-6
    controls = {"one positive known": batch(known=[row[:1] * 2 for row in KNOWN])}
    controls["whole texts only"] = batch(cut=lambda text: 1000 + text)
    controls["all queries differ"] = batch(query_ids=list(range(100, 100 + QUERIES)))
    for name, careless in controls.items():
        assert relative(sum(objective(vectors.float(), careless).values()), found[0]) > 1e-5, f"control: {name}"


def test_same_tower_adds_to_the_denominator(vectors):
    values = [sum(Objective(flags(name))(vectors, batch()).values()) for name in ("info_nce", "same_tower")]
    assert values[1] > values[0] + 0.1


@pytest.mark.parametrize("name", ["info_nce", "same_tower"])
def test_it_agrees_with_sentence_transformers(vectors, name):
    """On a batch without repeated texts, to 1e-6."""
    if "directions" not in inspect.signature(MultipleNegativesRankingLoss).parameters:
        pytest.skip("this sentence-transformers has no such loss")
    ids = list(range(QUERIES * GROUP))
    known = [[ids[query * GROUP]] for query in range(QUERIES)]
    plain = batch([100 + query for query in range(QUERIES)], ids, (), known, cut=lambda text: 1000 + text)
    directions = ("query_to_doc",) + (("query_to_query", "doc_to_doc") if name == "same_tower" else ())
    theirs = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=1 / TEMPERATURE, directions=directions)
    columns = [vectors[:QUERIES], *(vectors[QUERIES + g :: GROUP] for g in range(GROUP))]
    wanted = theirs.compute_loss_from_embeddings(columns, None)
    found = Objective(flags(name))(vectors, plain)[name]
    assert abs(found - wanted) / wanted < 1e-6


@pytest.mark.parametrize(("flag", "side"), [("emb_q_only", slice(0, QUERIES)), ("emb_p_only", slice(QUERIES, None))])
@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_flows_through_one_side_only(vectors, name, flag, side):
    both = loss_and_gradient(lambda v: Objective(flags(name))(v, batch())[name], vectors)
    one = loss_and_gradient(lambda v: Objective(flags(name, **{flag: True}))(v, batch())[name], vectors)
    assert torch.equal(both[0], one[0])
    wanted = torch.zeros_like(vectors)
    wanted[side] = both[1][side]
    assert torch.allclose(one[1], wanted, atol=1e-7)
    assert both[1].abs().sum() > one[1].abs().sum() > 0


def test_an_unused_slot_changes_nothing(vectors):
    vectors = vectors[:5]
    known = [[1], [2]]

    def loss(slots, ids):
        parts = ([0, 1], slots, [7, 8], ids, ids, known)
        return Objective(ObjectiveArguments(0.1))(vectors, ContrastiveBatch(*map(torch.tensor, parts)))["info_nce"]

    assert torch.allclose(loss([2, -1, 3, -1], [1, 0, 2, 0]), loss([2, 3], [1, 2]))
    assert not torch.allclose(loss([2, 4, 3, -1], [1, 5, 2, 0]), loss([2, 3], [1, 2]))


def test_known_positives_are_found():
    ids = torch.tensor([10, 11, 20, 10, 30, 21])
    known = torch.tensor([[10, 10], [20, 21], [30, 10]])
    assert is_known(ids, known).tolist() == [
        [True, False, False, True, False, False],
        [False, False, True, False, False, True],
        [True, False, False, True, True, False],
    ]


def test_many_known_positives_are_found_by_a_search():
    ids, known = torch.randint(0, 400, (50,)), torch.randint(0, 400, (7, MANY_KNOWN + 1))
    wanted = [[text in row for text in ids.tolist()] for row in known.tolist()]
    assert is_known(ids, known).tolist() == wanted
    assert any(map(any, wanted)) and not all(map(all, wanted))


def test_a_loss_of_equal_scores_is_the_logarithm_of_their_number():
    vectors = torch.ones(4, 1)
    two = ContrastiveBatch(*map(torch.tensor, ([0, 1], [2, 3], [7, 8], [1, 2], [1, 2], [[1], [2]])))
    assert math.isclose(Objective(ObjectiveArguments(0.5))(vectors, two)["info_nce"], math.log(2), rel_tol=1e-6)
