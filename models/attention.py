"""Padding-free attention, registered with transformers under the name "packed". No model code is patched.

A packed chunk is one row that holds its texts end to end; each text attends only to itself. On CUDA one varlen flash
kernel handles the row. Elsewhere each run of equally long texts is one call, so a CPU computes no padding.
Padded batches under the same name take transformers' own sdpa path. The direction and the window of a layer come from
the function that transformers makes its mask of, in both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gritlm.errors import UserError
from gritlm.models.families import head_width, is_causal

PACKED = "packed"


class CannotPack(UserError):
    """The attention of a model does not work without padding."""


@dataclass(frozen=True)
class Packing:
    """Where the N texts of a packed row begin and end.

    equal_length_runs: (count, length) of each run of equally long texts, on the host.
    cu_seqlens: int32 (N + 1,), cumulative lengths from 0, on the device.
    """

    equal_length_runs: tuple[tuple[int, int], ...]
    cu_seqlens: Tensor

    @property
    def max_length(self) -> int:
        return max(length for _, length in self.equal_length_runs)


class Band(NamedTuple):
    """How many tokens before and after itself a token attends to; -1 for all."""

    before: int
    after: int

    def kernel_options(self, length: int) -> tuple[bool, Tensor | None]:
        """For a text of this length: whether it is causal without a window; the mask, bool (L, L), of a window."""
        before, after = (length - 1 if reach < 0 else min(reach, length - 1) for reach in self)
        if before == length - 1 and after in (0, length - 1):
            return after < length - 1, None
        distance_LL = torch.arange(length) - torch.arange(length)[:, None]
        return False, (distance_LL >= -before) & (distance_LL <= after)


class Mask:
    """What transformers makes a layer's mask of, made when an attention call needs it.

    Args:
        options: the arguments of `sdpa_mask`.
    """

    def __init__(self, **options: Any):
        self.options = options
        self.bands: dict[int, Band] = {}

    @cached_property
    def padded(self) -> Tensor | None:
        """The mask of a padded batch."""
        return sdpa_mask(**self.options)

    def band(self, longest: int) -> Band:
        """The band in which texts of at most `longest` tokens attend. Reads no device."""
        if longest not in self.bands:
            allowed: Callable[..., Tensor] = self.options["mask_function"]
            with unset_fake_temporarily():  # where memory is counted without computing, numbers are needed all the same
                zero, last, every = torch.tensor(0), torch.tensor(longest - 1), torch.arange(longest)
                before, after = (int(allowed(zero, zero, query, every).expand(longest).sum()) for query in (last, zero))
            self.bands[longest] = Band(*(-1 if count == longest else count - 1 for count in (before, after)))
        return self.bands[longest]


def packed_attention(
    module: nn.Module,
    query_1HTd: Tensor,
    key_1KTd: Tensor,
    value_1KTd: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. H query heads, K key heads (H a multiple of K), T tokens, head width d.

    Args:
        packing: the texts of a packed row; None for a padded batch, which may have any batch size.
    Returns:
        (1, T, H, d), and None for the attention weights.
    Raises:
        CannotPack: the layer computes its scores in another way, or makes its mask itself.
    """
    if packing is None:
        if isinstance(attention_mask, Mask):
            attention_mask = attention_mask.padded
        return sdpa_attention_forward(
            module, query_1HTd, key_1KTd, value_1KTd, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if other := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise CannotPack(f"its attention has {other[0]}")
    if not isinstance(attention_mask, Mask):
        raise CannotPack("it makes its attention masks itself")
    band, config = attention_mask.band(packing.max_length), cast(Any, module.config)
    if band.after != (0 if is_causal(config) and packing.max_length > 1 else band.before):
        raise UserError(
            f"found a layer that attends to {band}, wanted {'causal' if is_causal(config) else 'symmetric'}"
        )
    half = value_1KTd.dtype in (torch.bfloat16, torch.float16)
    if not varlen_unavailable_reason(query_1HTd.device, half, dropout, query_1HTd.shape[-1]):
        return _one_varlen_call(query_1HTd, key_1KTd, value_1KTd, packing, scaling, band), None
    return _one_call_per_run(query_1HTd, key_1KTd, value_1KTd, packing, dropout, scaling, band), None


def varlen_unavailable_reason(device: torch.device, half: bool, dropout: float, head_width: int) -> str:
    """Why the varlen kernel cannot be used; "" if it can. Without it a GPU is slow, a CPU is not.

    Args:
        half: queries, keys and values are bfloat16 or float16.
        dropout: probability of dropping an attention weight.
        head_width: of a query; the kernel takes multiples of 8 up to 256.
    """
    if device.type != "cuda":
        return "no GPU"
    if dropout:
        return "attention dropout"
    if not half:
        return "float32; --bf16 is faster"
    if head_width % 8 or head_width > 256:
        return f"heads of width {head_width}, wanted a multiple of 8 up to 256"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"a GPU of compute capability {major}.{minor}, older than 8.0"


def varlen_backward_bytes(config: PreTrainedConfig, tokens: int, texts: int) -> int:
    """Bytes that the backward of `varlen_attn` allocates on a GPU, in one layer at a time.

    A float32 sum of the queries' gradient, padded by 128 rows for each text (torch, `mha_varlen_bwd` in flash_api.cpp).
    """
    return (tokens + 128 * texts) * config.num_attention_heads * -(-head_width(config) // 32) * 32 * 4


def _one_varlen_call(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, band: Band
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Under autocast the query and key norms return float32; the kernel needs one dtype.
    query_THd, key_TKd, value_TKd = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    cu_seqlens, max_length = packing.cu_seqlens, packing.max_length
    output_THd: Any = varlen_attn(
        *(query_THd, key_TKd, value_TKd, cu_seqlens, cu_seqlens, max_length, max_length),
        scale=scaling,
        window_size=(band.before, band.after),
        enable_gqa=True,
    )
    return output_THd[None]


def _one_call_per_run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    dropout: float,
    scaling: float | None,
    band: Band,
) -> Tensor:
    # split, not slices: the backward of split is one concatenation, that of a slice a whole tensor of zeros.
    sizes = [count * length for count, length in packing.equal_length_runs]
    outputs = []
    for (count, length), *parts in zip(
        packing.equal_length_runs, *(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True
    ):
        query_nHLd, key_nKLd, value_nKLd = (x.unflatten(1, (count, length)).transpose(0, 1) for x in parts)
        causal, window = band.kernel_options(length)
        output_nHLd = F.scaled_dot_product_attention(
            *(query_nHLd, key_nKLd, value_nKLd),
            attn_mask=None if window is None else window.to(query.device),
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=True,
        )
        outputs.append(output_nHLd.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]  # of a single run, too: another memory layout would recompile the layers


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, Mask)
