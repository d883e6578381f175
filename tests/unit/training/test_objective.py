"""Every row of TERMS against its formula, written apart in float64 with loops over queries and candidates."""

import inspect
import json
import math

import pytest
import torch
from helpers import WORDS, relative
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import MultipleNegativesRankingLoss

from gritlm.data.batches import ContrastiveBatch
from gritlm.data.records import load_records
from gritlm.errors import UserError
from gritlm.training.arguments import DataArguments, ObjectiveArguments
from gritlm.training.contrast import FEW_POSITIVES, Known, knows, shared_only
from gritlm.training.objective import Objective, needs_projection
from gritlm.training.start_report import check_scores
from gritlm.training.terms import TERMS, VARIANTS

TEMPERATURE, QUERIES, GROUP = 0.05, 8, 3
# Query 3 is query 2 once more. The positive of query 4 is known to answer query 5. Passage text 0 appears three times.
# After the cut, query 7 is query 4. Texts 20 and 7 are then text 19, query 7's positive, and text 17 is text 1.
QUERY_IDS = [100, 101, 102, 102, 104, 105, 106, 104]
SLOT_IDS = [0, 1, 2, 3, 0, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 13, 14, 15, 16, 17, 18, 19, 20, 21]
UNUSED = (5, 23)
AFTER_THE_CUT = {20: 19, 7: 19, 17: 1}
ONE = [[True], [True]]  # each query has one positive
# Text 9, a passage of query 3, is a known positive of query 4, and so of query 7.
KNOWN = [[0, 0], [3, 3], [5, 8], [5, 8], [11, 9], [13, 11], [16, 16], [19, 19]]


SCORES = torch.rand(QUERIES * GROUP, generator=torch.Generator().manual_seed(1))
SCORES[[5, 23, 10, 12]] = math.nan  # unused slots, a negative, and a positive
SCORES[3] = SCORES[0]
TEACHER = torch.randn(QUERIES * (1 + GROUP), 16, generator=torch.Generator().manual_seed(2))
TEACHER[[QUERIES + slot for slot in UNUSED]] = 0.0


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
        torch.ones(len(query_ids), 1, dtype=torch.bool),
        0,
        SCORES,
        *(
            torch.nn.functional.normalize(rows, dim=1)
            for rows in (TEACHER[: len(query_ids)], TEACHER[len(query_ids) :])
        ),
    )


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(QUERIES * (1 + GROUP), 16), dim=1)


def flags(name: str, **more) -> ObjectiveArguments:
    return ObjectiveArguments(**VARIANTS[name] | {"temperature": TEMPERATURE} | more)


# ---- the formulas


def others(query: int) -> list[int]:
    """Slots that are used and hold no known positive of the query."""
    used = [s for s in range(QUERIES * GROUP) if s not in UNUSED and SLOT_IDS[s] not in known_to(query)]
    return [s for s in used if tokens_of(SLOT_IDS[s]) not in positives(query)]


def known_to(query: int) -> set[int]:
    """The known positives of the query and of its equals."""
    return {text for other in range(QUERIES) if QUERY_IDS[other] == QUERY_IDS[query] for text in KNOWN[other]}


def positives(query: int) -> set[int]:
    """The tokens of the positives of the query and of its equals."""
    return {tokens_of(SLOT_IDS[other * GROUP]) for other in range(QUERIES) if QUERY_IDS[other] == QUERY_IDS[query]}


def similarity_to_positive(q, slots, query: int):
    return q[query] @ slots[query * GROUP]


def of_sum(q, slots, query: int, logits: list):
    """`-log( exp(s+/t) / (exp(s+/t) + sum of exp(logit)) )`."""
    own = (similarity_to_positive(q, slots, query) / TEMPERATURE).exp()
    return -torch.log(own / (own + sum(logit.exp() for logit in logits)))


def info_nce(q, slots, query: int, extra: tuple = (), bias=lambda score, slot: 0.0):
    scores = {s: q[query] @ slots[s] for s in others(query)}
    return of_sum(q, slots, query, [score / TEMPERATURE + bias(score, s) for s, score in scores.items()] + [*extra])


def same_tower(q, slots, query: int):
    extra = []
    for other in range(QUERIES):
        related = known_to(other) & known_to(query)
        if QUERY_IDS[other] != QUERY_IDS[query] and not related:
            extra.append(q[query] @ q[other] / TEMPERATURE)
    for s in others(query):
        if QUERY_IDS[s // GROUP] != QUERY_IDS[query]:
            extra.append(slots[query * GROUP] @ slots[s] / TEMPERATURE)
    return info_nce(q, slots, query, tuple(extra))


def passage_to_query(q, slots, query: int):
    own, logits = query * GROUP, []
    for other in range(QUERIES):
        knows = SLOT_IDS[own] in known_to(other) or tokens_of(SLOT_IDS[own]) in positives(other)
        if not knows and QUERY_IDS[other] != QUERY_IDS[query]:
            logits.append(slots[own] @ q[other] / TEMPERATURE)
    return of_sum(q, slots, query, logits)


def hard_only(q, slots, query: int):
    own = [s for s in others(query) if s // GROUP == query]
    return of_sum(q, slots, query, [q[query] @ slots[s] / TEMPERATURE for s in own])


def hardness(q, slots, query: int):
    def bias(score, slot):
        return (5.0 if QUERY_IDS[slot // GROUP] == QUERY_IDS[query] else 9.0) * score.detach()

    return info_nce(q, slots, query, (), bias)


def focal(q, slots, query: int):
    loss = info_nce(q, slots, query)
    return loss * (1 - (-loss.detach()).exp()) ** 2


def relative_margin(q, slots, query: int):
    own = similarity_to_positive(q, slots, query).detach()
    return info_nce(q, slots, query, (), lambda score, slot: -math.inf if score > own - 0.05 * abs(own) else 0.0)


def margin(q, slots, query: int):
    """With --same_tower: candidates of all three kinds go."""
    own, logits = similarity_to_positive(q, slots, query), []
    logits += [q[query] @ slots[s] for s in others(query)]
    logits += [slots[query * GROUP] @ slots[s] for s in others(query) if QUERY_IDS[s // GROUP] != QUERY_IDS[query]]
    for other in range(QUERIES):
        if QUERY_IDS[other] != QUERY_IDS[query] and not known_to(other) & known_to(query):
            logits.append(q[query] @ q[other])
    return of_sum(q, slots, query, [score / TEMPERATURE for score in logits if score <= own + 0.3])


def debiased(q, slots, query: int):
    """`max( (-tau N e^{s+/t} + sum of e^{s/t}) / (1 - tau), N e^{-1/t} )`."""
    own, tau = (similarity_to_positive(q, slots, query) / TEMPERATURE).exp(), 0.1
    scores = [(q[query] @ slots[s] / TEMPERATURE).exp() for s in others(query)]
    corrected = (-tau * len(scores) * own + sum(scores)) / (1 - tau)
    bounded = corrected.clamp(min=len(scores) * math.exp(-1 / TEMPERATURE))
    return -torch.log(own / (own + bounded))


def mean_of(formula):
    """The mean over queries of a formula of one query."""

    def mean(vectors):
        return sum(formula(vectors[:QUERIES], vectors[QUERIES:], query) for query in range(QUERIES)) / QUERIES

    return mean


def sigreg(vectors):
    """The characteristic function at each knot, direction by direction."""
    used = [v for number, v in enumerate(vectors) if number - QUERIES not in UNUSED]
    x, (width, count) = torch.stack(used) * vectors.shape[1] ** 0.5, (vectors.shape[1], len(used))
    directions = torch.randn(width, 256, generator=torch.Generator().manual_seed(0)).double()
    total = 0.0
    for direction in directions.T:
        projected = x @ (direction / direction.norm())
        for number in range(-16, 17):  # the trapezoidal rule over [-3, 3]
            t = 3 * number / 16
            ecf = torch.exp(1j * t * projected).mean()
            rule = 3 / 16 * (0.5 if abs(number) == 16 else 1.0)
            total = total + rule * math.exp(-t * t / 2) * (ecf - math.exp(-t * t / 2)).abs().square()
    return 0.95 * mean_of(info_nce)(vectors) + 0.05 * count * total / 256


def spread_out(vectors):
    total = mean_of(info_nce)(vectors)
    for side in (vectors[:QUERIES], vectors[QUERIES::GROUP]):
        scores = [a @ b for i, a in enumerate(side) for j, b in enumerate(side) if i != j]
        first, second = sum(scores) / len(scores), sum(s * s for s in scores) / len(scores)
        total = total + first**2 + torch.relu(second - 1 / vectors.shape[1])
    return total


def matryoshka(vectors):
    narrow = [torch.nn.functional.normalize(vectors[:, :width], dim=1) for width in (8, 4)]
    return sum(w * mean_of(info_nce)(v) for w, v in zip((1, 0.5, 0.25), (vectors, *narrow), strict=True))


# ---- the formulas of scores and of a teacher's vectors


def normal(rows):
    return torch.nn.functional.normalize(rows.double(), dim=1)


def scored(query: int) -> list[int]:
    """Slots of the query's row that have a score."""
    return [s for s in range(query * GROUP, (query + 1) * GROUP) if not SCORES[s].isnan()]


def cosent(vectors, similarity=lambda a, b: a @ b):
    q, slots, total = vectors[:QUERIES], vectors[QUERIES:], 1.0
    pairs = [(similarity(q[n], slots[n * GROUP]), SCORES[n * GROUP]) for n in range(QUERIES)]
    for s_i, y_i in pairs:
        for s_j, y_j in pairs:
            total = total + ((s_j - s_i) / 0.05).exp() * float(y_i > y_j)
    return total.log()


def angle(a, b):
    half = len(a) // 2
    x, y = torch.complex(a[:half], a[half:]), torch.complex(b[:half], b[half:])
    product = x * y.conj()
    return (product.real.sum() + product.imag.sum()).abs()


def distill(q, slots, query: int):
    own = scored(query)
    if not own:
        return 0.0
    student = torch.stack([q[query] @ slots[s] / 0.05 for s in own]).log_softmax(0)
    target = (SCORES[own].double() / 0.05).softmax(0)
    return 0.05**2 * (target * (target.log() - student)).sum()


def margin_mse(q, slots, query: int):
    own, errors = query * GROUP, []
    for s in scored(query):
        if s != own and own in scored(query):
            found = q[query] @ slots[own] - q[query] @ slots[s]
            errors.append((found - (SCORES[own].double() - SCORES[s].double())) ** 2)
    return sum(errors) / len(errors) if errors else 0.0


def teacher(kind: str):
    goal = torch.cat([normal(TEACHER[:QUERIES]), normal(TEACHER[QUERIES:])])

    def of_query(q, slots, query: int):
        own = [(q[query], goal[query])]
        own += [(slots[s], goal[QUERIES + s]) for s in range(query * GROUP, (query + 1) * GROUP) if s not in UNUSED]
        if kind == "mse":
            return sum((x - y).square().mean() for x, y in own) / len(own)
        return sum(1 - (x @ y) / (x.norm() * y.norm()) for x, y in own) / len(own)

    def all_scores(vectors):
        used = [s for s in range(QUERIES * GROUP) if s not in UNUSED]
        pairs = [(query, QUERIES + s) for query in range(QUERIES) for s in used]
        errors = [(vectors[a] @ vectors[b] - goal[a] @ goal[b]).square() for a, b in pairs]
        return sum(errors) / len(errors)

    return all_scores if kind == "scores" else mean_of(of_query)


def guided(q, slots, query: int):
    goal_q, goal_s = normal(TEACHER[:QUERIES]), normal(TEACHER[QUERIES:])
    limit = goal_q[query] @ goal_s[query * GROUP]
    return info_nce(q, slots, query, (), lambda score, s: -math.inf if goal_q[query] @ goal_s[s] > limit else 0.0)


def with_info_nce(formula):
    return lambda vectors: mean_of(info_nce)(vectors) + formula(vectors)


FORMULAS = {
    "info_nce": mean_of(info_nce),
    "same_tower": mean_of(same_tower),
    "passage_to_query": lambda v: 0.5 * mean_of(info_nce)(v) + 0.5 * mean_of(passage_to_query)(v),
    "sigreg": sigreg,
    "spread_out": spread_out,
    "hard_negatives": mean_of(hard_only),
    "hardness": mean_of(hardness),
    "focal": mean_of(focal),
    "margin": mean_of(margin),
    "relative_margin": mean_of(relative_margin),
    "debiased": mean_of(debiased),
    "cosent": lambda vectors: 0.1 * cosent(vectors),
    "angle": lambda vectors: 0.1 * cosent(vectors, angle),
    "distill": with_info_nce(mean_of(distill)),
    "margin_mse": with_info_nce(mean_of(margin_mse)),
    "teacher": with_info_nce(teacher("cosine")),
    "teacher_mse": with_info_nce(teacher("mse")),
    "teacher_scores": with_info_nce(teacher("scores")),
    "guide": mean_of(guided),
    "matryoshka": matryoshka,
}
# The masks change nothing there: no candidate of another row, or all of them left out by the margin.
WITHOUT_CONTROLS = {"hard_negatives", "relative_margin", "cosent", "angle", "guide"}


def loss_of(name: str, **more):
    objective = Objective(flags(name, **more))
    repeat = 1 + needs_projection(objective.args)  # the projection on the teacher's width is the vector itself
    return lambda vectors, *where: sum(objective(vectors.repeat(1, repeat), *(where or (batch(),))).values())


def loss_and_gradient(function, vectors):
    vectors = vectors.clone().requires_grad_()
    loss = function(vectors)
    return loss.detach(), torch.autograd.grad(loss, vectors)[0]


def test_every_term_has_a_formula():
    assert FORMULAS.keys() == VARIANTS.keys()
    assert set(TERMS) <= set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_term_is_its_formula(vectors, name, dtype):
    vectors = vectors.to(dtype)
    found = loss_and_gradient(lambda v: loss_of(name)(v.float()), vectors.float())
    wanted = loss_and_gradient(FORMULAS[name], vectors.double())
    assert relative(found[0].double(), wanted[0]) < 1e-6
    assert relative(found[1].double(), wanted[1]) < 1e-6
    for other, formula in FORMULAS.items():
        assert other == name or relative(found[0].double(), formula(vectors.double())) > 1e-4, f"control: {other}"
    controls = {"one positive known": batch(known=[row[:1] * 2 for row in KNOWN])}
    controls["whole texts only"] = batch(cut=lambda text: 1000 + text)
    controls["all queries differ"] = batch(query_ids=list(range(100, 100 + QUERIES)))
    for what, careless in controls.items():
        if name not in WITHOUT_CONTROLS:
            assert relative(loss_of(name)(vectors.float(), careless), found[0]) > 1e-6, f"control: {what}"


def test_same_tower_adds_to_the_denominator(vectors):
    values = [sum(Objective(flags(name))(vectors, batch()).values()) for name in ("info_nce", "same_tower")]
    assert values[1] > values[0] + 0.1


# ---- sentence-transformers' classes, on a batch without repeated texts

BOTH_WAYS = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
TOWERS = {"directions": ("query_to_doc", "query_to_query", "doc_to_doc")}
THEIRS = {  # our flags, their arguments
    "info_nce": ({}, {}),
    "same_tower": ({"same_tower": True}, TOWERS),
    "symmetric": ({"symmetric": True}, BOTH_WAYS),
    "hard": ({"hardness_hard": 5.0}, {"hardness_mode": "hard_negatives", "hardness_strength": 5.0}),
    "in-batch": ({"hardness_in_batch": 9.0}, {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0}),
}


def without_repeats() -> ContrastiveBatch:
    ids = list(range(QUERIES * GROUP))
    known = [[ids[query * GROUP]] for query in range(QUERIES)]
    return batch([100 + query for query in range(QUERIES)], ids, (), known, cut=lambda text: 1000 + text)


def columns_of(vectors) -> list:
    return [vectors[:QUERIES], *(vectors[QUERIES + g :: GROUP] for g in range(GROUP))]


@pytest.mark.parametrize("name", THEIRS)
def test_it_agrees_with_sentence_transformers(vectors, name):
    """To 1e-6."""
    ours, theirs = THEIRS[name]
    if not theirs.keys() <= inspect.signature(MultipleNegativesRankingLoss).parameters.keys():
        pytest.skip("this sentence-transformers has no such loss")
    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=1 / TEMPERATURE, **theirs)
    wanted = loss.compute_loss_from_embeddings(columns_of(vectors), None)
    found = sum(Objective(ObjectiveArguments(TEMPERATURE, **ours))(vectors, without_repeats()).values())
    assert abs(found - wanted) / wanted < 1e-6
    other = ObjectiveArguments(TEMPERATURE, **THEIRS["same_tower" if name == "info_nce" else "info_nce"][0])
    wrong = sum(Objective(other)(vectors, without_repeats()).values())
    assert abs(wrong - wanted) / wanted > 1e-3, "control: another loss"


def test_spread_out_and_widths_agree_with_sentence_transformers(vectors):
    losses = pytest.importorskip("sentence_transformers.losses")
    if not hasattr(losses, "GlobalOrthogonalRegularizationLoss"):
        pytest.skip("this sentence-transformers has no such loss")
    theirs = losses.GlobalOrthogonalRegularizationLoss(torch.nn.Identity(), aggregation="sum")
    wanted = sum(theirs.compute_loss_from_embeddings(columns_of(vectors)[:2]).values())
    found = Objective(flags("spread_out"))(vectors, without_repeats())["spread_out"]
    assert abs(found - wanted) / wanted < 1e-6
    assert abs(found - sum(theirs.compute_loss_from_embeddings(columns_of(vectors)[1:3]).values())) > 1e-3, "control"
    theirs, terms = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=1 / TEMPERATURE), {}
    for width in (8, 4):
        narrow = [column[:, :width] for column in columns_of(vectors)]  # their similarity is the cosine
        terms[f"info_nce@{width}"] = theirs.compute_loss_from_embeddings(narrow, None)
    found = Objective(ObjectiveArguments(TEMPERATURE, matryoshka_dims=[8, 4]))(vectors, without_repeats())
    assert found.keys() == {"info_nce", *terms}
    assert all(abs(found[name] - wanted) / wanted < 1e-6 for name, wanted in terms.items())


def theirs_of(name: str, *columns, labels=None, **settings):
    """What sentence-transformers' class says of vectors, with labels."""
    losses = pytest.importorskip("sentence_transformers.losses")
    if not hasattr(losses, name):
        pytest.skip("this sentence-transformers has no such loss")
    return getattr(losses, name)(torch.nn.Identity(), **settings).compute_loss_from_embeddings([*columns], labels)


@pytest.mark.parametrize("name", ["cosent", "angle", "distill", "margin_mse", "teacher", "teacher_mse"])
def test_scores_and_teachers_agree_with_sentence_transformers(vectors, name):
    columns, where = columns_of(vectors), without_repeats()
    where.scores_S = torch.rand(QUERIES * GROUP, generator=torch.Generator().manual_seed(5))
    where.teacher_SE = torch.nn.functional.normalize(torch.randn(QUERIES * GROUP, 16), dim=1)
    scores_BG = where.scores_S.view(QUERIES, GROUP)
    goals = [where.teacher_BE, *(where.teacher_SE[g::GROUP] for g in range(GROUP))]
    wanted = {
        "cosent": lambda: theirs_of("CoSENTLoss", *columns[:2], labels=scores_BG[:, 0]),
        "angle": lambda: theirs_of("AnglELoss", *columns[:2], labels=scores_BG[:, 0]),
        "distill": lambda: theirs_of("DistillKLDivLoss", *columns, labels=scores_BG, temperature=0.05),
        "margin_mse": lambda: theirs_of("MarginMSELoss", *columns, labels=scores_BG),
        "teacher": lambda: theirs_of("EmbedDistillLoss", *columns, labels=goals),
        "teacher_mse": lambda: theirs_of("EmbedDistillLoss", *columns, labels=goals, distance_metric="mse"),
    }[name]()
    args, term = flags(name), name.replace("teacher_mse", "teacher")
    terms = Objective(args)(vectors.repeat(1, 1 + needs_projection(args)), where)
    found = terms[term] / TERMS[term].weight(args)
    assert abs(found - wanted) / wanted < 1e-6
    where.scores_S, where.teacher_BE = where.scores_S.flip(0), where.teacher_BE.flip(0)
    other = Objective(args)(vectors.repeat(1, 1 + needs_projection(args)), where)[term] / TERMS[term].weight(args)
    assert abs(other - wanted) / wanted > 1e-3, "control: what the teacher says of other rows"


# The class, its arguments, how many columns of texts, our flags, and flags that must not agree.
WITH_A_MODEL = {
    "GIST": ("GISTEmbedLoss", {}, 2, {"guide_margin": 0.0, "same_tower": True}, {"same_tower": True}),
    "GIST with a hard negative": (
        "GISTEmbedLoss",
        {"contrast_anchors": False, "contrast_positives": False},
        *(3, {"guide_margin": 0.0}, {}),
    ),
    "GIST with a margin": ("GISTEmbedLoss", {"margin": -0.05}, 2, {"guide_margin": 0.05, "same_tower": True}, {}),
    "cached GIST": ("CachedGISTEmbedLoss", {}, 2, {"guide_margin": 0.0, "same_tower": True}, {"same_tower": True}),
    "cached": ("CachedMultipleNegativesRankingLoss", {}, 4, {}, {"symmetric": True}),
    "symmetric": ("MultipleNegativesSymmetricRankingLoss", {}, 4, {"symmetric": True}, {}),
    "cached symmetric": ("CachedMultipleNegativesSymmetricRankingLoss", {}, 4, {"symmetric": True}, {}),
    "Matryoshka": (
        "MatryoshkaLoss",
        {"matryoshka_dims": [32, 8, 4], "matryoshka_weights": [1.0, 0.5, 0.25]},
        *(4, {"matryoshka_dims": [8, 4], "matryoshka_weights": [0.5, 0.25]}, {"matryoshka_dims": [8, 4]}),
    ),
}


@pytest.fixture(scope="module")
def two_models(qwen3, qwen2):
    """A student and a guide of sentence-transformers, and the features of a batch: query, positive, two negatives."""
    student, guide = SentenceTransformer(str(qwen3), device="cpu"), SentenceTransformer(str(qwen2), device="cpu")
    texts = [[" ".join(WORDS[7 * c + r : 9 * c + 2 * r + 3]) for r in range(QUERIES)] for c in range(1 + GROUP)]
    return student.eval(), guide.eval(), [student.tokenize(column) for column in texts]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", WITH_A_MODEL)
def test_it_agrees_with_classes_that_need_a_model(two_models, name):
    losses, (student, guide, features) = pytest.importorskip("sentence_transformers.losses"), two_models
    kind, settings, columns, ours, other = WITH_A_MODEL[name]
    if not hasattr(losses, kind):
        pytest.skip("this sentence-transformers has no such loss")
    scale = {"temperature": TEMPERATURE} if "GIST" in kind else {"scale": 1 / TEMPERATURE}
    if kind == "MatryoshkaLoss":
        scale = {"loss": MultipleNegativesRankingLoss(student, **scale)}
    more = ({"guide": guide} if "GIST" in kind else {}) | ({"mini_batch_size": 3} if "Cached" in kind else {})
    with torch.no_grad():
        wanted = getattr(losses, kind)(student, **scale, **settings, **more)(
            [dict(column) for column in features[:columns]], torch.zeros(QUERIES)
        )
        own, their = (
            [torch.nn.functional.normalize(model(dict(f))["sentence_embedding"], dim=1) for f in features]
            for model in (student, guide)
        )
    unused = [slot for slot in range(QUERIES * GROUP) if slot % GROUP >= columns - 1]
    where, ids = without_repeats(), list(range(QUERIES * GROUP))
    where = batch(where.query_id_B.tolist(), ids, unused, [[i] for i in ids[::GROUP]], cut=lambda text: 1000 + text)
    where.teacher_BE, where.teacher_SE = their[0], torch.stack(their[1:], 1).flatten(0, 1)
    vectors = torch.cat([own[0], torch.stack(own[1:], 1).flatten(0, 1)])
    found, wrong = (
        sum(Objective(ObjectiveArguments(TEMPERATURE, **args))(vectors, where).values()) for args in (ours, other)
    )
    assert abs(found - wanted) / wanted < 1e-6
    assert abs(wrong - wanted) / wanted > 1e-3, "control"


# ---- single terms


@pytest.mark.parametrize("similarity", [0.99, 0.2, -0.9], ids=["below the bound", "between", "above"])
def test_the_debiased_loss_is_finite_at_a_low_temperature(similarity):
    """Below its bound the negatives get no gradient."""
    negative = torch.tensor([0.0, 1.0])
    positive = torch.tensor([similarity, (1 - similarity**2) ** 0.5])
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    vectors = torch.cat([queries, torch.stack([positive, negative, positive, negative])])
    two = ContrastiveBatch(
        *map(torch.tensor, ([0, 1], [2, 3, 4, 5], [7, 8], [1, 2, 3, 4], [1, 2, 3, 4], [[1], [3]], ONE))
    )
    objective = Objective(ObjectiveArguments(0.01, debiased=True, in_batch_negatives=False))
    loss, gradient = loss_and_gradient(lambda v: sum(objective(v, two).values()), vectors)
    assert loss.isfinite() and gradient.isfinite().all()
    assert (gradient[3].abs().sum() > 0) == (similarity < 0), "the negative's gradient"


SEVERAL = (0, 2, 4, 6)  # queries whose second slot holds another positive


@pytest.mark.parametrize("more", [{}, {"debiased": True}, {"focal_gamma": 2.0}], ids=str)
def test_each_of_several_positives_is_contrasted_for_itself(vectors, more):
    """The other positives of a query are no negatives of it."""
    extra = [SLOT_IDS[q * GROUP + (q in SEVERAL)] for q in range(QUERIES)]
    where = batch(known=[[*row, more] for row, more in zip(KNOWN, extra, strict=True)])
    where.positives_BM = torch.tensor([[True, q in SEVERAL] for q in range(QUERIES)])

    def wanted(vectors):
        q, slots, total = vectors[:QUERIES], vectors[QUERIES:], 0.0
        for query in range(QUERIES):
            equal = [other for other in range(QUERIES) if QUERY_IDS[other] == QUERY_IDS[query]]
            known = {*where.known_positives_BK[equal].flatten().tolist()}
            slots_of = {other: [other * GROUP, other * GROUP + 1][: 1 + (other in SEVERAL)] for other in equal}
            own, tokens = slots_of[query], {tokens_of(SLOT_IDS[s]) for row in slots_of.values() for s in row}
            used = [s for s in range(QUERIES * GROUP) if s not in UNUSED and SLOT_IDS[s] not in known]
            negatives = [q[query] @ slots[s] / TEMPERATURE for s in used if tokens_of(SLOT_IDS[s]) not in tokens]
            losses = []
            for s in own:
                positive = (q[query] @ slots[s] / TEMPERATURE).exp()
                against, count = sum(score.exp() for score in negatives), len(negatives)
                if "debiased" in more:
                    corrected = (against - 0.1 * count * positive) / 0.9
                    against = corrected.clamp(min=count * math.exp(-1 / TEMPERATURE))
                loss = -torch.log(positive / (positive + against))
                losses.append(loss * (1 - (-loss.detach()).exp()) ** 2 if "focal_gamma" in more else loss)
            total = total + sum(losses) / len(losses)
        return total / QUERIES

    objective = Objective(ObjectiveArguments(TEMPERATURE, **more))
    found = loss_and_gradient(lambda v: sum(objective(v, where).values()), vectors)
    truth = loss_and_gradient(wanted, vectors.double())
    assert relative(found[0].double(), truth[0]) < 1e-6
    assert relative(found[1].double(), truth[1]) < 1e-6
    where.positives_BM = torch.ones(QUERIES, 1, dtype=torch.bool)
    assert relative(sum(objective(vectors, where).values()), found[0]) > 1e-3, "control: one positive"


@pytest.mark.parametrize("number", [0, 1], ids=["first", "second"])
def test_a_positive_of_an_equal_query_is_no_negative(vectors, number):
    """By its tokens, whichever of the query's positives it is: queries 0 and 1 are equal after the cut."""
    parts = [0, 1], [2, 3, 4, 5], [7, 7], [1, 2, 3, 4], [11, 12, 13, 14], [[1, 2], [3, 4]], [[True, True]] * 2
    two = ContrastiveBatch(*map(torch.tensor, parts))
    two.known_positives_BK = torch.tensor([[1, 2], [3, 4]]) + 90  # whole texts differ
    assert sum(Objective(ObjectiveArguments(TEMPERATURE))(vectors[:6], two).values()) == 0, "no negative is left"
    two.positives_BM[0, number] = number == 0
    if number:
        assert Objective(ObjectiveArguments(TEMPERATURE))(vectors[:6], two)["info_nce"] > 0, "control: a hard negative"
    two.query_id_B[1] = 8
    assert Objective(ObjectiveArguments(TEMPERATURE))(vectors[:6], two)["info_nce"] > 0, "control: other queries"


def test_the_margin_counts_what_it_leaves_out(vectors):
    """Counted apart, from the similarities."""
    objective = Objective(flags("margin"))
    objective(vectors, batch())
    q, slots = vectors[:QUERIES], vectors[QUERIES:]
    wanted = 0
    for query in range(QUERIES):
        limit = q[query] @ slots[query * GROUP] + 0.3
        wanted += sum(bool(q[query] @ slots[s] > limit) for s in others(query))
        other_rows = [s for s in others(query) if QUERY_IDS[s // GROUP] != QUERY_IDS[query]]
        wanted += sum(bool(slots[query * GROUP] @ slots[s] > limit) for s in other_rows)
        for other in range(QUERIES):
            if QUERY_IDS[other] != QUERY_IDS[query] and not known_to(other) & known_to(query):
                wanted += bool(q[query] @ q[other] > limit)
    assert objective.left_out["margins"] == wanted > 5
    widths = Objective(flags("margin", matryoshka_dims=[8, 4]))
    widths(vectors, batch())
    assert widths.left_out["margins"] == wanted, "at the full width"
    where, flags_of = batch(), [flags("margin"), flags("margin", focal_gamma=1.0), flags("info_nce", temperature=0.2)]
    for sets, share in (((0, 1), 1.0), ((2, 2), 0.0), ((0, 2), None)):
        where.set_B, where.sets = torch.tensor([sets[query >= 4] for query in range(QUERIES)]), sets
        halves = Objective(flags_of[0], by_set=flags_of)
        halves(vectors, where)
        found = halves.left_out.get("margins", 0)
        assert 0 < found < wanted if share is None else found == share * wanted, "of each query once"
    plain = Objective(flags("info_nce"))
    plain(vectors, batch())
    assert not plain.left_out, "control"


def test_sigreg_draws_other_directions_with_another_seed(vectors):
    where, values = batch(), []
    for seed in (0, 0, 1):
        where.seed = seed
        values.append(Objective(flags("sigreg"))(vectors, where)["sigreg"])
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(("flag", "side"), [("emb_q_only", slice(0, QUERIES)), ("emb_p_only", slice(QUERIES, None))])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_gradient_flows_through_one_side_only(vectors, name, flag, side):
    both, one = (loss_and_gradient(loss_of(name, **more), vectors) for more in ({}, {flag: True}))
    assert torch.equal(both[0], one[0])
    wanted = torch.zeros_like(vectors)
    wanted[side] = both[1][side]
    assert torch.allclose(one[1], wanted, atol=1e-7)
    assert both[1].abs().sum() > one[1].abs().sum() > 0


def test_an_unused_slot_changes_nothing(vectors):
    vectors = vectors[:5]
    known = [[1], [2]]

    def loss(slots, ids):
        parts = ([0, 1], slots, [7, 8], ids, ids, known, ONE)
        return Objective(ObjectiveArguments(0.1))(vectors, ContrastiveBatch(*map(torch.tensor, parts)))["info_nce"]

    assert torch.allclose(loss([2, -1, 3, -1], [1, 0, 2, 0]), loss([2, 3], [1, 2]))
    assert not torch.allclose(loss([2, 4, 3, -1], [1, 5, 2, 0]), loss([2, 3], [1, 2]))


@pytest.mark.parametrize("width", [1, 3, 100])
def test_known_positives_are_found(width):
    """Against a loop, with queries that equal others, and texts that several queries know."""
    torch.manual_seed(0)
    known = Known(torch.randint(0, 12, (16,)), torch.randint(0, 500 * width, (16, width)))
    known.text_QK[:, width // 2 :] = known.text_QK[:, :1]  # padding
    known.text_QK[3, 0] = known.text_QK[9, -1]
    texts = torch.cat([known.text_QK[:, :1], torch.randint(0, 500 * width, (16, 1))], dim=1)

    def knows_in_a_loop(rows: Known, queries, texts):
        of = [
            {t for q, own in zip(*(x.tolist() for x in rows), strict=True) if q == query for t in own}
            for query in queries.tolist()
        ]
        return [[bool(own & {*row}) for row in texts.tolist()] for own in of]

    queries = known.query_Q[:7]
    wanted = knows_in_a_loop(known, queries, texts)
    assert knows(known, queries, texts).tolist() == wanted
    assert any(map(any, wanted)) and not all(map(all, wanted))
    by_row = [[t in own for (t, _) in texts.tolist()] for own in known.text_QK[:7].tolist()]
    assert by_row != wanted, "control: equal queries know the same"

    shared = shared_only(known)
    related = knows(shared, known.query_Q, shared.text_QK) | (known.query_Q[:, None] == known.query_Q)
    assert related.tolist() == knows(known, known.query_Q, known.text_QK).tolist()
    assert shared.text_QK.shape[1] <= (2 if width > FEW_POSITIVES else width) and related[3, 9] and not related.all()


SCORED = {  # term -> rows that it cannot learn from, rows that it can
    "cosent_weight": ({"score": 0.5}, {"score": 0.7}),
    "angle_weight": ({"score": 0.5}, {"score": 0.7}),
    "distill_weight": ({"pos_scores": [0.5], "neg": ["c"]}, {"pos_scores": [0.5], "neg": ["c"], "neg_scores": [0.1]}),
    "margin_mse_weight": (
        {"pos_scores": [None], "neg": ["c", "d"], "neg_scores": [0.1, 0.2]},
        {"pos_scores": [0.5], "neg": ["c", "d"], "neg_scores": [None, 0.1]},
    ),
}


@pytest.mark.parametrize("term", SCORED)
def test_rows_whose_scores_train_nothing_are_counted(tmp_path, term):
    args = ObjectiveArguments(**{term: 1.0, "contrastive_weight": 0.0})
    bad, good = ({"query": "a", "pos": ["b"], "neg": []} | row for row in SCORED[term])

    def check(*rows, **data):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(row | {"query": f"{n}"}) + "\n" for n, row in enumerate(rows)))
        return check_scores([args], load_records(path, tmp_path / "cache"), DataArguments(**data))

    with pytest.raises(UserError, match=f"--{term}: found scores of positives in ([02]) rows .* in d, wanted"):
        check(bad, bad)
    if term in ("cosent_weight", "angle_weight"):
        assert check(bad, good) == []
        (line,) = check(bad, good, {"query": "a", "pos": ["b"], "neg": []})
        assert line == f"d: --{term} learns from the scores of 2 of 3 rows"
        return
    (line,) = check(bad, good, bad)
    assert line == f"d: --{term} learns from the scores of 1 of 3 rows"
    with pytest.raises(UserError, match="nothing would be learnt"):
        check(good, train_group_size=1)
    hidden = {"query": "0", "pos": [good["neg"][-1]], "neg": []}  # the scored negative is a positive there
    path = tmp_path / "h.jsonl"
    path.write_text("".join(json.dumps(row | {"query": "0"}) + "\n" for row in (good, hidden)))
    with pytest.raises(UserError, match="and of negatives in 0"):
        check_scores([args], load_records(path, tmp_path / "cache"), DataArguments())


def test_a_loss_of_equal_scores_is_the_logarithm_of_their_number():
    vectors = torch.ones(4, 1)
    two = ContrastiveBatch(*map(torch.tensor, ([0, 1], [2, 3], [7, 8], [1, 2], [1, 2], [[1], [2]], ONE)))
    assert math.isclose(Objective(ObjectiveArguments(0.5))(vectors, two)["info_nce"], math.log(2), rel_tol=1e-6)


def test_scores_in_the_data_and_in_the_loss_must_agree(tmp_path):
    """Pairs with a score are no positives, and a loss of scores needs scores."""
    rows = {"query": "a", "pos": ["b"], "neg": []}
    for name, row in (("pairs", rows | {"score": 0.1}), ("plain", rows)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    sets = {name: load_records(tmp_path / f"{name}.jsonl", tmp_path / "cache") for name in ("pairs", "plain")}
    cosent = ObjectiveArguments(cosent_weight=1.0, contrastive_weight=0.0)
    check_scores([ObjectiveArguments()], sets["plain"], DataArguments())
    with pytest.raises(
        UserError, match="pairs: found the key 'score' in 1 rows, which would all be trained as positives"
    ):
        check_scores([ObjectiveArguments()], sets["pairs"], DataArguments())
    with pytest.raises(UserError, match="--cosent_weight: found no scores in plain"):
        check_scores([cosent], sets["plain"], DataArguments())
