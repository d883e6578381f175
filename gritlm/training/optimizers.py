"""The run's optimizer: Muon beside AdamW, a learning rate for new layers, stochastic rounding of bfloat16 weights."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from gritlm.training.arguments import TuningArguments
from gritlm.training.engines import on_whole_matrix
from gritlm.training.run_log import log

NEW_LAYERS = ("projection.", "teacher_projection.")
EMBEDDINGS = ("embed", "wte", "wpe")  # in the names of lookup tables, and of adapters on them
FIRST_STEPS = 10  # over which the weights that stand still are counted
SAMPLE = 4096  # weights of a tensor that are counted, about


class OptimizerTrainer(Trainer):
    """Hugging Face's Trainer with the optimizers of `TuningArguments`."""

    optimizer: Any
    tuning = TuningArguments()
    rounding: "StochasticRounding | None" = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        model, args, tuning = model or self.model, self.args, self.tuning
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        optimizer = super().create_optimizer(model)
        if tuning.use_muon:
            matrices = [weight for name, weight in weights.items() if is_hidden_matrix(name, weight.dim())]
            take(optimizer, matrices)
            options: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
            muon = Muon(matrices, **options, adjust_lr_fn="match_rms_adamw")
            muon.dtype = getattr(torch, tuning.muon_iteration)
            optimizer = MuonWithAdamW(muon, optimizer)
        if tuning.projection_learning_rate is not None:
            new = [weight for name, weight in weights.items() if name.startswith(NEW_LAYERS)]
            for group in take(optimizer, new):
                optimizer.add_param_group(group | {"lr": tuning.projection_learning_rate})
        if tuning.bf16_weights:
            optimizer = self.rounding = StochasticRounding(optimizer, args.seed)
        self.optimizer = optimizer
        return self.optimizer

    def _get_learning_rate(self) -> float:
        self.projection_rate = self.optimizer.param_groups[-1]["lr"]  # of the same step
        return super()._get_learning_rate()


def describe_tuning(tuning: TuningArguments) -> list[str]:
    """What the flags of optimizers, precision and averages mean for the run and for what it publishes."""
    lines = []
    if tuning.use_muon and tuning.muon_iteration == "bfloat16":
        lines.append("  Muon: iterates in bfloat16, so the run depends on the number of GPUs")
    if tuning.bf16_weights:
        saved = "" if tuning.ema_decay else "; they are published so"
        lines.append(f"  weights: the backbone's are bfloat16, rounded stochastically{saved}; moments are float32")
    if tuning.ema_decay is not None:
        lines.append(
            f"  weights: the average of --ema_decay {tuning.ema_decay} (float32) is evaluated and published, and is "
            "the model folder of each checkpoint"
        )
    return lines


def take(optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Remove weights from an optimizer that has not stepped. Returns them in groups with their former options."""
    taken, wanted = [], set(map(id, weights))
    for group in optimizer.param_groups:
        found = [weight for weight in group["params"] if id(weight) in wanted]
        group["params"] = [weight for weight in group["params"] if id(weight) not in wanted]
        taken += [group | {"params": found}] if found else []
    return taken


# ---- Muon


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Whether Muon trains a weight. AdamW trains embeddings, vectors and the new layers."""
    return dimensions == 2 and not name.startswith(NEW_LAYERS) and not any(part in name for part in EMBEDDINGS)


def describe_split(shapes: Mapping[str, Sequence[int]]) -> str:
    """A line that says which optimizer trains how many weights, and the largest that AdamW trains, by name."""
    hidden = {name: shape for name, shape in shapes.items() if is_hidden_matrix(name, len(shape))}
    others = {name: shape for name, shape in shapes.items() if name not in hidden}
    vectors = sum(len(shape) < 2 for shape in others.values())
    named = [name for name, shape in others.items() if len(shape) > 1] + [f"{vectors} vectors"] * (vectors > 0)
    counts = [sum(map(math.prod, part.values())) for part in (hidden, others)]
    return (
        f"Muon: {len(hidden)} matrices, {counts[0]:,} weights; AdamW: {', '.join(named) or 'none'}, {counts[1]:,} "
        "weights"
    )


def orthogonalize(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """The Newton-Schulz iteration of Muon (Jordan et al., kellerjordan.github.io/posts/muon), as torch.optim.Muon does.

    In bfloat16 it turns noise of 1e-7 in its input into 1% of an update.

    Args:
        matrix: (M, N).
        coefficients: (a, b, c) of the step X <- a X + (b A + c A A) X, where A = X X^T.
        dtype: of the products.
    Returns:
        (M, N) of `dtype`, all singular values near 1.
    """
    a, b, c = coefficients
    x = matrix.to(dtype)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Muon):
    """torch's Muon with a choice of the iteration's dtype, and for shards of FSDP2: it gathers each whole update."""

    dtype = torch.float32

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            rate, beta = group["lr"], group["momentum"]
            weights: list[Tensor] = []
            gradients: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, weights, gradients, buffers)
            for weight, gradient, buffer in zip(weights, gradients, buffers, strict=True):
                buffer.lerp_(gradient, 1 - beta)
                arguments = group["ns_coefficients"], group["ns_steps"], group["eps"], self.dtype
                update = on_whole_matrix(orthogonalize, gradient.lerp(buffer, beta), *arguments)
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * rate * math.sqrt(max(weight.shape)))  # the update's RMS is AdamW's


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers as one: its groups are theirs, and they share its state."""

    def __init__(self, muon: Muon, adamw: torch.optim.Optimizer):
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {"lr": muon.defaults["lr"]})

    def step(self, closure=None):
        for part in (self.muon, self.adamw):
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if ("ns_steps" in group) == (part is self.muon)]
            part.step()


# ---- bfloat16 weights


def to_bfloat16(module: nn.Module) -> None:
    """Turn a module's weights into bfloat16; its buffers stay. Gradients are added up in float32."""
    for weight in module.parameters():
        weight.data = weight.data.bfloat16()
        weight.grad_dtype = torch.float32


class StochasticRounding(torch.optim.Optimizer):
    """Steps an optimizer on float32 copies of bfloat16 weights, one by one, and rounds each result stochastically.

    Moments are float32. The rounding is drawn from (seed, step, tensor), alike on all ranks.

    Args:
        optimizer: has not stepped. Weights that are not bfloat16 are stepped as they are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int):
        self.optimizer, self.seed, self.still = optimizer, seed, StandStill()
        self.weight_of: dict[Tensor, Tensor] = {}
        for group in optimizer.param_groups:
            group["params"] = list(map(self._stand_in, group["params"]))
        super().__init__(optimizer.param_groups, {"lr": optimizer.defaults["lr"]})  # schedules read it
        self.param_groups[0]["roundings"] = 0  # kept in checkpoints

    def _stand_in(self, weight: Tensor) -> Tensor:
        if weight.dtype != torch.bfloat16:
            return weight
        copy = nn.Parameter(torch.empty(0, device=weight.device))
        self.weight_of[copy] = weight
        return copy

    @torch.no_grad()
    def step(self, closure=None):
        self.param_groups[0]["roundings"] += 1
        step, tensor = self.param_groups[0]["roundings"], 0
        self.optimizer.state = self.state
        for group in self.param_groups:
            for copy in group["params"]:
                weight, tensor = self.weight_of.get(copy), tensor + 1
                if weight is not None:
                    copy.data = weight.float()
                    copy.grad = weight.grad
                self.optimizer.param_groups = [group | {"params": [copy]}]
                self.optimizer.step()
                if weight is not None:
                    rounded = round_stochastically(copy.data, (self.seed, step, tensor))
                    if group["lr"] > 0:  # a warm-up begins at 0
                        self.still.count(tensor, weight, rounded, copy.data)
                    weight.copy_(rounded)
                    copy.grad = None
                    copy.data = copy.data.new_empty(0)
        self.still.end_step()


def round_stochastically(exact: Tensor, draw: Sequence[int]) -> Tensor:
    """Round to a neighbour in bfloat16, up with the probability that makes the expectation `exact`.

    Args:
        exact: float32.
        draw: what the rounding is drawn from, whole numbers of 0 or more.
    """
    seed = int(np.random.SeedSequence(draw).generate_state(1, np.uint64)[0])
    generator = torch.Generator(exact.device).manual_seed(seed)
    noise = torch.randint(2**16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator)
    return noise.add_(exact.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


class StandStill:
    """Counts the weights that the first steps have left as they were, on about `SAMPLE` weights of each tensor."""

    def __init__(self) -> None:
        self.moved: dict[int, tuple[int, Tensor]] = {}
        self.steps = 0

    def count(self, tensor: int, weight: Tensor, rounded: Tensor, exact: Tensor) -> None:
        """Note which weights of a tensor move, rounded as they are, and would move, rounded to nearest."""
        if self.steps < FIRST_STEPS:
            before, one, other = (x.flatten()[:: 1 + x.numel() // SAMPLE] for x in (weight, rounded, exact.bfloat16()))
            moves = torch.stack([one != before, other != before])
            self.moved[tensor] = weight.numel(), moves | self.moved[tensor][1] if tensor in self.moved else moves

    def end_step(self, last: bool = False) -> None:
        """Say it after the first steps, or after the last one."""
        if not self.moved:
            return
        self.steps += not last
        if self.steps == FIRST_STEPS or last:
            shares = [(size, (~moved).float().mean(1)) for size, moved in self.moved.values()]
            total = sum(size for size, _ in shares)
            kept, nearest = sum((size / total * share for size, share in shares), torch.zeros(2)).tolist()
            log.info(
                "bfloat16 weights: %.1f%% stood still in the first %d steps with a learning rate above 0; rounded to "
                "nearest, %.1f%% would have",
                *(100 * kept, self.steps, 100 * nearest),
            )
            self.moved, self.steps = {}, FIRST_STEPS + 1
