"""Linear layers on a CPU whose products run in oneDNN where it is faster than torch.mm (MKL uses no AVX-512 on AMD)."""

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN compiles a product for each number of rows, and keeps 1,024 of up to half a megabyte; torch keeps as many, too.
# A chunk has a length that hardly comes again, so few are of use.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")

DIRECTIONS = ("forward", "input gradient", "weight gradient")
NARROW = 64  # rows or columns; below it the call costs as much as the product
TOKENS = 1024  # in a block of the weight gradient, and at most in the measurement
ROUNDS = 5
GAIN = 1.2  # by which oneDNN must be faster; more than the noise, so that equal runs choose alike
TOLERANCE = 1e-5  # relative norm, between two float32 products


@torch.library.custom_op("gritlm::onednn_product", mutates_args=())
def product(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`a @ b.T + bias` in float32 by oneDNN. One opaque operator, so that torch.compile keeps the layouts."""
    if len(a_MK) < NARROW:
        return F.linear(a_MK, b_NK, bias_N)
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, bias_N, "none", [], "")


@product.register_fake
def _(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return a_MK.new_empty(a_MK.shape[0], b_NK.shape[0])


@torch.library.custom_op("gritlm::onednn_product_over_tokens", mutates_args=())
def product_over_tokens(a_TM: Tensor, b_TN: Tensor) -> Tensor:
    """`a.T @ b`, in blocks of tokens: oneDNN sums all of them in one float32 number, with twice the error of MKL."""
    blocks = zip(a_TM.split(TOKENS), b_TN.split(TOKENS), strict=True)
    a_SM, b_SN = next(blocks)
    sum_MN = product(a_SM.t(), b_SN.t())
    for a_SM, b_SN in blocks:
        sum_MN += product(a_SM.t(), b_SN.t())
    return sum_MN


@product_over_tokens.register_fake
def _(a_TM: Tensor, b_TN: Tensor) -> Tensor:
    return a_TM.new_empty(a_TM.shape[1], b_TN.shape[1])


def _weight_gradient(gradient_TO: Tensor, x_TI: Tensor) -> Tensor:
    """oneDNN is up to a third faster with the narrower matrix first."""
    if gradient_TO.shape[1] > x_TI.shape[1]:
        return product_over_tokens(x_TI, gradient_TO).t()
    return product_over_tokens(gradient_TO, x_TI)


TORCH: tuple[Callable[..., Tensor], ...] = (F.linear, torch.mm, lambda gradient_TO, x_TI: gradient_TO.t() @ x_TI)
ONEDNN: tuple[Callable[..., Tensor], ...] = (
    product,
    lambda gradient_TO, weight_OI: product(gradient_TO, weight_OI.t()),
    _weight_gradient,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, fast: tuple[bool, bool, bool]) -> Tensor:
        # As torch does, a frozen weight keeps no input.
        ctx.save_for_backward(x_TI if weight_OI.requires_grad else None, weight_OI)
        ctx.fast = fast
        return (ONEDNN if fast[0] else TORCH)[0](x_TI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Any:
        gradient_TO = gradients[0].contiguous()
        x_TI, weight_OI = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (ONEDNN if ctx.fast[1] else TORCH)[1](gradient_TO, weight_OI)
        if ctx.needs_input_grad[1]:
            of_weight = (ONEDNN if ctx.fast[2] else TORCH)[2](gradient_TO, x_TI)
        if ctx.needs_input_grad[2]:
            of_bias = gradient_TO.sum(0)
        return of_x, of_weight, of_bias, None


class CPULinear(nn.Linear):
    """`nn.Linear` with products by oneDNN in the directions of `fast`, in float32 on a CPU. Elsewhere a plain one."""

    fast: tuple[bool, bool, bool]

    def forward(self, input: Tensor) -> Tensor:
        float32 = input.dtype == self.weight.dtype == torch.float32
        if input.device.type != "cpu" or not float32 or torch.is_autocast_enabled("cpu"):
            return F.linear(input, self.weight, self.bias)
        rows_TI = input.reshape(-1, self.in_features)
        return _Linear.apply(rows_TI, self.weight, self.bias, self.fast).view(*input.shape[:-1], self.out_features)


def use_products(model: nn.Module, directions: Collection[str]) -> None:
    """Take the products of these directions from oneDNN, in place. Parameters and their names stay the same."""
    first, second, third = (name in directions for name in DIRECTIONS)
    for layer in list(_layers(model)):
        layer.__class__ = CPULinear if directions else nn.Linear
        if isinstance(layer, CPULinear):
            layer.fast = first, second, third


def products_of(model: nn.Module) -> list[str]:
    """The directions in which `use_products` has set oneDNN."""
    fast: list[tuple[bool, bool, bool]] = [m.fast for m in model.modules() if isinstance(m, CPULinear)]
    return [name for name, chosen in zip(DIRECTIONS, fast[0], strict=True) if chosen] if fast else []


def _layers(model: nn.Module) -> Iterator[nn.Linear]:
    """The layers to replace: plain ones in float32 on a CPU, and not narrow as an adapter's are."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and type(layer) in (nn.Linear, CPULinear):
            weight = layer.weight
            if weight.device.type == "cpu" and weight.dtype == torch.float32 and min(weight.shape) >= NARROW:
                yield layer


def measure_products(model: nn.Module, directions: Collection[str] = DIRECTIONS) -> tuple[dict[str, float], str]:
    """Time both products on the shapes of the model's layers, and compare their values.

    Returns:
        How many times as fast as torch oneDNN is, in each of the directions. None where no layer can be replaced.
        "", or why oneDNN cannot be used: it is missing, fails, or gives other numbers.
    """
    shapes = Counter(tuple(layer.weight.shape) for layer in _layers(model) if directions)
    seconds = {name: [0.0, 0.0] for name in DIRECTIONS if name in directions} if shapes else {}
    generator = torch.Generator().manual_seed(0)
    try:
        for (rows, columns), count in shapes.items():
            tokens = max(2 * NARROW, min(TOKENS, 2**28 // (rows * columns)))
            sizes = (tokens, columns), (rows, columns), (tokens, rows)
            x_TI, weight_OI, gradient_TO = (torch.randn(size, generator=generator) for size in sizes)
            operands = (x_TI, weight_OI), (gradient_TO, weight_OI), (gradient_TO, x_TI)
            for name, *ways, pair in zip(DIRECTIONS, TORCH, ONEDNN, operands, strict=True):
                if name in seconds:
                    for number, taken in enumerate(_compare(ways, pair)):
                        seconds[name][number] += count * taken
    except (RuntimeError, AttributeError) as error:  # another torch may lack the operator, which is private
        return {}, f"{type(error).__name__}: {' '.join(str(error).split()[:20])}"
    return {name: plain / fast for name, (plain, fast) in seconds.items()}, ""


@torch.no_grad()
def _compare(ways: list[Callable[..., Tensor]], operands: tuple[Tensor, Tensor]) -> list[float]:
    """The shortest time of each way, in turn."""
    wanted, found = (way(*operands) for way in ways)
    difference = ((found - wanted).norm() / wanted.norm()).item()
    if not difference <= TOLERANCE:
        raise RuntimeError(f"its products differ by {difference:.0e} in relative norm")
    best = [float("inf")] * len(ways)
    for _ in range(ROUNDS):
        for number, way in enumerate(ways):
            started = time.process_time()  # all threads, without what other processes take
            way(*operands)
            best[number] = min(best[number], time.process_time() - started)
    return best


def choose_products(model: nn.Module, directions: Collection[str] = DIRECTIONS) -> tuple[list[str], str]:
    """The directions in which oneDNN is clearly faster on this machine, and a line about it; "" if nothing can be."""
    gains, problem = measure_products(model, directions)
    chosen = [name for name, gain in gains.items() if gain >= GAIN]
    measured = ", ".join(f"{name} {gain:.1f}x" for name, gain in gains.items())
    if problem:
        return [], f"by torch.mm, since oneDNN cannot be used ({problem})"
    if not gains:
        return [], ""
    return chosen, f"oneDNN for {', '.join(chosen) or 'nothing'} (its speed by torch.mm's: {measured})"
