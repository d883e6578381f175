"""Padding-free attention, registered with transformers under the name "packed"; no model code is touched.

A chunk is one row of texts, one after the other; each attends to itself alone. On CUDA one varlen flash kernel does it,
elsewhere one call per run of equally long texts (on a CPU the flash kernel's cost is then that of the real tokens).
Padded batches take transformers' own sdpa path under the same name.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "packed"


@dataclass(frozen=True)
class Packing:
    """Where the texts of a packed row lie: (count, length) of each run on the host, the starts on the device."""

    equal_length_runs: tuple[tuple[int, int], ...]
    cu_seqlens: Tensor  # int32 (N + 1,), 0 and the end of each text

    @property
    def longest(self) -> int:
        return max(length for _, length in self.equal_length_runs)


def packed_attention(
    module: nn.Module,
    query_1HTd: Tensor,
    key_1KTd: Tensor,
    value_1KTd: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **more,
) -> tuple[Tensor, None]:
    """transformers' attention interface. H query heads, K key heads (H a multiple of K), T tokens, head width d.

    Returns:
        (1, T, H, d), and no weights.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query_1HTd, key_1KTd, value_1KTd, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    causal = module.config.is_causal
    half = value_1KTd.dtype in (torch.bfloat16, torch.float16)
    if not varlen_unavailable_reason(query_1HTd.device, half, dropout):
        return _one_varlen_call(query_1HTd, key_1KTd, value_1KTd, packing, scaling, causal), None
    return _a_call_per_run(query_1HTd, key_1KTd, value_1KTd, packing, dropout, scaling, causal), None


def varlen_unavailable_reason(device: torch.device, half: bool, dropout: float) -> str:
    """What keeps a row's texts from one varlen kernel (slow on a GPU, not on a CPU); "" if nothing does."""
    if device.type != "cuda":
        return "no GPU"
    if dropout:
        return "attention dropout"
    if not half:
        return "float32; --bf16 is faster"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"a GPU of compute capability {major}.{minor}, older than 8.0"


def _one_varlen_call(query, key, value, packing: Packing, scaling: float | None, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Under autocast the norms before give float32; the kernel wants one dtype.
    query_THd, key_TKd, value_TKd = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    starts, longest = packing.cu_seqlens, packing.longest
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(
        *(query_THd, key_TKd, value_TKd, starts, starts, longest, longest),
        scale=scaling,
        window_size=window,
        enable_gqa=True,
    )[None]


def _a_call_per_run(query, key, value, packing: Packing, dropout: float, scaling: float | None, causal: bool) -> Tensor:
    # split, not slices: its backward is one concatenation, not a whole tensor of zeros for each run.
    sizes = [count * length for count, length in packing.equal_length_runs]
    outputs = []
    for (count, length), *parts in zip(
        packing.equal_length_runs, *(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True
    ):
        query_nHLd, key_nKLd, value_nKLd = (x.unflatten(1, (count, length)).transpose(0, 1) for x in parts)
        output_nHLd = F.scaled_dot_product_attention(
            *(query_nHLd, key_nKLd, value_nKLd),
            dropout_p=dropout,
            is_causal=causal and length > 1,
            scale=scaling,
            enable_gqa=True,
        )
        outputs.append(output_nHLd.transpose(1, 2).flatten(0, 1))
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
