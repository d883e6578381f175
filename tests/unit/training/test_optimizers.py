"""Muon, rates of new layers, bfloat16 weights, and every optimizer of Hugging Face, on one process and on engines."""

import re

import pytest
import torch
from helpers import make_embedder, relative
from processes import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler
from transformers.training_args import OptimizerNames

from gritlm.distributed import all_ranks, rank
from gritlm.models.base_files import Base
from gritlm.models.chunks import ChunkConfig
from gritlm.training import optimizers
from gritlm.training.arguments import EmbeddingTrainingArguments, TuningArguments
from gritlm.training.compare_gradients import Case
from gritlm.training.engines import engine_for, wrap_model
from gritlm.training.gradcache import two_pass_step
from gritlm.training.inherited_flags import OPTIMIZERS
from gritlm.training.objective import Objective
from gritlm.training.optimizers import (
    FIRST_STEPS,
    MuonWithAdamW,
    StochasticRounding,
    describe_split,
    is_hidden_matrix,
    orthogonalize,
    round_stochastically,
    to_bfloat16,
)
from gritlm.training.rehearsal import build_optimizer
from gritlm.training.state_files import load_state, save_state

CPU = torch.device("cpu")


def arguments(**more) -> EmbeddingTrainingArguments:
    return EmbeddingTrainingArguments(**{"output_dir": "unused", "use_cpu": True, "learning_rate": 1e-3} | more)


def update_of(model: nn.Module, before: dict[str, torch.Tensor]) -> torch.Tensor:
    """How far the weights are from where they began, whole, as one vector."""
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return torch.cat([(whole[name].detach() - before[name]).flatten() for name in before])


def steps_on(engine: str, folder, tuning: TuningArguments, fault: str = "", chunk_tokens: int = 64) -> dict:
    """Three steps of the same global batches on this rank's engine: the update, the gradient, the dtypes of it."""
    torch.manual_seed(0)
    model = make_embedder(folder, projection=16).train()
    if tuning.bf16_weights:
        to_bfloat16(model.backbone)
    if fault == "sum in bfloat16":
        for weight in model.parameters():
            weight.grad_dtype = weight.dtype
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped, _ = wrap_model(model, torch.optim.SGD(model.parameters()), engine, CPU, tuning.bf16_weights)
    optimizer = build_optimizer(arguments(), model, tuning)
    if fault == "shards":
        whole, patch = optimizers.orthogonalize, pytest.MonkeyPatch()
        patch.setattr(optimizers, "orthogonalize", lambda x, *a: torch.cat([whole(half, *a) for half in x.chunk(2)]))
    case = Case("info_nce", True, 8 if engine == "plain" else 4, 40, chunk_tokens)
    objective, slice_ = Objective(case.flags, all_ranks()), slice(0, 8)
    if engine != "plain":
        slice_ = slice(rank() * 4, rank() * 4 + 4)
    gradient = None
    for texts in case.batches(model.config.vocab_size):
        chunks, batch = texts.batch(slice_, ChunkConfig(chunk_tokens), CPU)
        two_pass_step(engine_for(wrapped), chunks, lambda vectors, batch=batch: objective(vectors, batch))
        gradient = gradient or {n: p.grad.clone() for n, p in model.named_parameters()}
        if fault == "sum in bfloat16":
            break  # the rest would refuse it
        optimizer.step()
        model.zero_grad()
    if fault == "shards":
        patch.undo()
    dtypes = {g.dtype for g in gradient.values()}
    if fault == "sum in bfloat16":  # but for the projection
        gradient = {n: g for n, g in gradient.items() if g.dtype == torch.bfloat16}
    gradient = torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in gradient.values()])
    return {"update": update_of(model, before), "gradient": gradient, "dtypes": dtypes, "chunks": len(chunks)}


# ---- Muon


@pytest.mark.parametrize("shape", [(192, 128), (128, 192)])
def test_muon_is_that_of_torch(shape):
    """In bfloat16 bit for bit. In float32 it is near float64, and what noise does to it shows why."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for _ in range(2)]
    weights[1].data = weights[0].data.clone()
    options = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    ours, torchs = optimizers.Muon([weights[0]], **options), torch.optim.Muon([weights[1]], **options)
    ours.dtype = torch.bfloat16
    for _ in range(3):
        for weight, optimizer in zip(weights, (ours, torchs), strict=True):
            weight.grad = torch.sin(torch.arange(weight.numel()) * (1 + weight.detach().sum())).view(shape)
            optimizer.step()
    assert torch.equal(*weights)

    gradient, options = torch.randn(shape), ((3.4445, -4.775, 2.0315), 5, 1e-7)
    noisy = gradient * (1 + 1e-6 * torch.randn(shape))

    def under_noise(dtype: torch.dtype) -> float:
        return relative(*(orthogonalize(x, *options, dtype).double() for x in (noisy, gradient)))

    exact = orthogonalize(gradient.double(), *options, torch.float64)
    assert relative(orthogonalize(gradient, *options, torch.float32).double(), exact) < 1e-5
    assert under_noise(torch.float32) < 1e-4
    assert under_noise(torch.bfloat16) > 1e-3, "control"


def test_every_weight_has_its_optimizer(base_model):
    model = make_embedder(base_model, projection=16)
    model.add_teacher_projection(8)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(arguments(), model, TuningArguments(use_muon=True, projection_learning_rate=5e-2))
    assert isinstance(optimizer, MuonWithAdamW)
    rates = {names[id(p)]: (group["lr"], "betas" in group) for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(names.values()) and sum(len(g["params"]) for g in optimizer.param_groups) == len(names)
    linear = {f"backbone.{name}.weight" for name, m in model.backbone.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, (_, adamw) in rates.items() if not adamw} == linear
    new = {name for name, (rate, _) in rates.items() if rate == 5e-2}
    assert new == {f"{part}.{kind}" for part in ("projection", "teacher_projection") for kind in ("weight", "bias")}
    decays = {group["weight_decay"] for group in optimizer.param_groups if group["lr"] == 5e-2}
    assert decays == {0.05, 0.0}, "a bias has none"
    floor = {"min_lr": 1e-4}  # which the schedule compares with the rate that the optimizer was made with
    scheduler = get_scheduler("cosine_with_min_lr", optimizer, 2, 10, scheduler_specific_kwargs=floor)
    optimizer.step()
    scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 2.5e-2}, "half way up, both"


def test_a_plan_counts_the_same_matrices(base_model):
    model = make_embedder(base_model)
    shapes = Base(str(base_model), model.config).expected
    listed = describe_split(shapes)
    assert listed == describe_split({n: p.shape for n, p in model.backbone.named_parameters()})
    found = re.fullmatch(
        r"Muon: (\d+) matrices, (.*) weights; AdamW: embed_tokens.weight, \d+ vectors, (.*) weights", listed
    )
    assert int(found[1]) == 14
    counts = [int(found[n].replace(",", "")) for n in (2, 3)]
    assert sum(counts) == sum(p.numel() for p in model.backbone.parameters())
    assert not is_hidden_matrix("backbone.embed_tokens.weight", 2) and not is_hidden_matrix("projection.weight", 2)


MUON, BFLOAT16 = TuningArguments(use_muon=True), TuningArguments(bf16_weights=True)
NOISY = TuningArguments(use_muon=True, muon_iteration="bfloat16")
BOTH = TuningArguments(use_muon=True, bf16_weights=True)
ON_RANKS = {
    "ddp": ("ddp", MUON),
    "fsdp2": ("fsdp2", MUON),
    "shards": ("fsdp2", MUON, "shards"),
    "noisy": ("ddp", NOISY),
    "bfloat16": ("ddp", BFLOAT16, "", 1),
    "both": ("ddp", BOTH, "", 1),
}


def all_cells(folder) -> dict[str, dict]:
    return {name: steps_on(engine, folder, *rest) for name, (engine, *rest) in ON_RANKS.items()}


@pytest.fixture(scope="module")
def on_ranks(qwen3) -> list[dict[str, dict]]:
    """What each of two ranks has found, by cell."""
    return run_ranks(all_cells, qwen3)


def test_muon_over_engines(qwen3, on_ranks):
    """At most 1e-4 of the update after three steps. Controls: a bfloat16 iteration, and shards made orthogonal."""
    plain, noisy = (steps_on("plain", qwen3, tuning)["update"] for tuning in (MUON, NOISY))
    for found in on_ranks:
        error = {name: relative(found[name]["update"], plain) for name in ("ddp", "fsdp2", "shards")}
        error["noisy"] = relative(found["noisy"]["update"], noisy)
        print(error)
        assert max(error["ddp"], error["fsdp2"]) < 1e-4
        assert min(error["noisy"], error["shards"]) > 1e-3


# ---- bfloat16 weights


def test_rounding_is_right_in_the_mean_and_drawn_anew():
    """Neighbours in bfloat16 only, the mean is the value, the same draw is the same, another is another."""
    value = torch.tensor([1.0, -1.0, 3e-5, -7.7, 0.0]) * (1 + 2**-9)  # a quarter of the way to the next
    many = value.repeat(20_000, 1)
    rounded = round_stochastically(many, (3, 1, 2)).float()
    for column, exact in zip(rounded.T, value, strict=True):
        assert len(column.unique()) <= 2
        assert abs(column.mean() - exact) <= 1e-4 * abs(exact)
    assert relative(value.bfloat16().float(), value) > 3e-4, "control: to nearest it is not"
    again, other = (round_stochastically(many, draw).float() for draw in ((3, 1, 2), (3, 2, 2)))
    assert torch.equal(again, rounded) and not torch.equal(other, rounded)
    assert torch.isnan(round_stochastically(torch.tensor([float("nan")]), (1, 1, 1))).all()


@pytest.mark.parametrize("cell", ["bfloat16", "both"])
def test_bfloat16_weights_on_two_ranks(qwen3, on_ranks, cell):
    """The replicas stay equal, bit for bit. Chunks are added up in float32; control: a sum in bfloat16 is seen."""
    one, other = (found[cell] for found in on_ranks)
    assert one["chunks"] > 10 and one["dtypes"] == {torch.float32}
    assert torch.equal(one["update"], other["update"]) and torch.equal(one["gradient"], other["gradient"])
    exact = steps_on("plain", qwen3, TuningArguments())["gradient"]
    assert relative(one["gradient"], exact) < 5e-2
    summed = steps_on("plain", qwen3, BFLOAT16, "sum in bfloat16", 1)["gradient"]
    ours, theirs = ((g.bfloat16() == g)[g != 0].float().mean() for g in (one["gradient"], summed))
    assert ours < 0.5 < theirs == 1, "bfloat16 numbers among the sums"


def test_what_stands_still_is_said(qwen3, logged):
    """A rate that is a small share of a weight's spacing: to nearest, hardly a weight would move."""
    logged.set_level("INFO")
    model = make_embedder(qwen3)
    to_bfloat16(model.backbone)
    optimizer = build_optimizer(arguments(learning_rate=2e-5), model, TuningArguments(bf16_weights=True))
    for _ in range(FIRST_STEPS):
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight, dtype=torch.float32)
        optimizer.step()
    (line,) = [record.message for record in logged.records if "stood still" in record.message]
    still, nearest = (float(re.search(pattern, line)[1]) for pattern in (r"([\d.]+)% stood", r"nearest, ([\d.]+)%"))
    assert still < 60 < 90 < nearest, line


# ---- states


class Small(nn.Module):
    """A hidden matrix, an embedding and a norm, large enough for states in 8 bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.layer, self.norm = nn.Embedding(64, 128), nn.Linear(128, 128), nn.LayerNorm(128)

    def forward(self, step: int) -> torch.Tensor:
        return self.norm(self.layer(self.embed((torch.arange(40) * (step + 1)) % 64))).square().sin().sum()


def train_small(name: str, tuning: TuningArguments, path=None) -> torch.Tensor:
    """Three steps; with a path, the second and third by another optimizer that has read the first one's state."""
    model = Small()
    if tuning.bf16_weights:
        to_bfloat16(model)
    args = arguments(optim=name)
    optimizer = build_optimizer(args, model, tuning)
    for step in range(3):
        if path and step == 1:
            save_state(optimizer.state_dict(), path)
            optimizer = build_optimizer(args, model, tuning)
            optimizer.load_state_dict(load_state(path))
        model(step).backward()
        optimizer.step()
        model.zero_grad()
    moved = [not torch.equal(a, b.to(a.dtype)) for a, b in zip(model.parameters(), Small().parameters(), strict=True)]
    assert all(moved), "something is learnt"
    return torch.cat([p.detach().flatten() for p in model.parameters()])


NEEDS = {  # what is said where the package is missing
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "stable_adamw": "torch-optimi",
    **dict.fromkeys(
        [
            *("adamw_bnb_8bit", "adamw_8bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit"),
            *("paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
            *("paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
        ],
        "bitsandbytes",
    ),
}
PLAIN = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_optimizer_of_hugging_face(tmp_path):
    """It takes three steps and goes on from its state bit for bit, or it is refused by name, with a reason."""
    outcomes = {}
    for name in [kind.value for kind in OptimizerNames]:
        if name in OPTIMIZERS:
            outcomes[name] = "refused"
            continue
        try:
            whole = train_small(name, TuningArguments())
        except (ImportError, ValueError) as error:
            assert NEEDS[name] in str(error), name
            outcomes[name] = "not installed"
            continue
        assert torch.equal(train_small(name, TuningArguments(), tmp_path / "state.safetensors"), whole), name
        outcomes[name] = "works"
    print(outcomes)
    assert {name for name, outcome in outcomes.items() if outcome == "works"} - NEEDS.keys() == PLAIN
    assert outcomes.keys() == PLAIN | NEEDS.keys() | OPTIMIZERS.keys()


@pytest.mark.parametrize("muon, bf16", [(True, False), (False, True), (True, True)])
def test_our_optimizers_go_on_from_their_state(tmp_path, muon, bf16):
    tuning = TuningArguments(use_muon=muon, bf16_weights=bf16)
    whole = train_small("adamw_torch_fused", tuning)
    assert torch.equal(train_small("adamw_torch_fused", tuning, tmp_path / "state.safetensors"), whole)
    assert torch.equal(whole, train_small("adamw_torch_fused", TuningArguments())) is False, "control: of its own"


def test_moments_are_float32(tmp_path):
    model = Small()
    to_bfloat16(model)
    optimizer = build_optimizer(arguments(), model, TuningArguments(bf16_weights=True))
    assert isinstance(optimizer, StochasticRounding)
    model(0).backward()
    optimizer.step()
    save_state(optimizer.state_dict(), tmp_path / "state.safetensors")
    optimizer.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(copy.numel() == 0 for copy in optimizer.weight_of), "copies are freed"
