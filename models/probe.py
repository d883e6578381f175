"""Test a model's attention on the kernel it really uses: direction, padding, packing."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from gritlm.errors import UserError, first_line
from gritlm.models.attention import PACKED
from gritlm.models.embedder import Embedder
from gritlm.models.families import FAMILIES, is_causal, longest_text
from gritlm.models.text import TextContract
from gritlm.models.tiny import one_layer

LONG = 2048  # tokens of the longest text that the probe looks at; more where a text can cross a wider window


class AttentionError(UserError):
    """The model's attention differs from the one asked for."""


@torch.no_grad()
def probe_attention(
    wrapped: nn.Module, embedder: Embedder, device: torch.device, attn: str, exact: bool = True
) -> dict[str, float]:
    """Check the attention of a model on random tokens.

    (a) Changing the last token changes the first token's state if attention is bidirectional, and only then. (b) A text
    has the same states in a padded batch as alone. (c) The ids of the padding do not matter. (d) A text has the same
    states in a packed row as alone, and its neighbours do not matter. (e) The same beside a text of 2,048 tokens, and
    packed for this text. (f) A packed row of one-token texts has their states in a padded batch.

    Args:
        wrapped: the module to call: the embedder or an engine around it. Where calls are collective, on all ranks.
        attn: the attention asked for: "bb" (bidirectional) or "cc" (causal).
        exact: false if the model computes in less than float32.
    Returns:
        The relative change of the states, in norm: "last_to_first" for (a), "padded" for (b), "leak" for (c), and for
        a model that packs "packed" and "packed_leak" for (d), "packed_long" and "packed_beside_long" for (e),
        "packed_one_token" for (f), else "beside_long". With experts the median over tokens, since rounding may send a
        token to another expert.
    Raises:
        AttentionError: a check failed; it names the check, what was found and what was wanted.
    """
    was_training = wrapped.training
    wrapped.eval()
    states: list[Tensor] = []
    hook = embedder.backbone.register_forward_hook(lambda module, inputs, output: states.append(output[0]))

    def run(input_ids: Tensor, lengths: list[int], **options: Any) -> Tensor:
        lengths_N = torch.tensor(lengths, device=device)
        wrapped(input_ids=input_ids, lengths=lengths_N, prompt_lengths=torch.zeros_like(lengths_N), **options)
        return states.pop().float()

    config = embedder.config
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
    window = getattr(config, "sliding_window", None) or 0
    long = window + 64 if LONG <= window < embedder.contract.longest else LONG
    try:
        long = min(long, longest_text(config) or long)
        changes = _measure_changes(run, config.vocab_size, embedder.packed, device, long, experts)
    finally:
        hook.remove()
        wrapped.train(was_training)
    _check_changes(changes, attn, 1e-3 if exact and experts else 1e-5 if exact else 5e-2)
    return changes


def _measure_changes(
    run: Callable[..., Tensor], vocabulary: int, packs: bool, device: torch.device, long: int, experts: bool
) -> dict[str, float]:
    """The relative changes that `probe_attention` returns; `run` gives the states of one forward pass."""
    generator = torch.Generator().manual_seed(0)
    long_L, other_L = (torch.randint(0, vocabulary, (12,), generator=generator).to(device) for _ in range(2))
    short_L = torch.randint(0, vocabulary, (7,), generator=generator).to(device)
    changed_L = long_L.clone()
    changed_L[-1] = (long_L[-1] + 1) % vocabulary

    def first_state(ids_L: Tensor) -> Tensor:
        states = run(ids_L, [12], equal_length_runs=((1, 12),)) if packs else run(ids_L[None], [12])
        return states[0, 0]

    def in_batch(padding: int) -> Tensor:
        batch = torch.full((2, 12), padding, device=device)
        batch[0], batch[1, :7] = long_L, short_L
        return run(batch, [12, 7])[1, :7]

    def in_row(neighbour_L: Tensor) -> Tensor:
        row = torch.cat([neighbour_L, short_L, neighbour_L[:7]])
        return run(row, [12, 7, 7], equal_length_runs=((1, 12), (2, 7)))[0, 12:19]

    def change(a: Tensor, b: Tensor) -> float:
        if experts:
            return ((a - b).norm(dim=-1) / b.norm(dim=-1)).median().item()
        return ((a - b).norm() / b.norm()).item()

    alone, padded = run(short_L[None], [7])[0], in_batch(0)
    changes = {
        "last_to_first": change(first_state(changed_L), first_state(long_L)),
        "padded": change(padded, alone),
        "leak": change(in_batch(vocabulary - 1), padded),
    }
    if packs:
        packed = in_row(long_L)
        changes |= {"packed": change(packed, alone), "packed_leak": change(in_row(other_L), packed)}
    text_L = torch.randint(0, vocabulary, (long,), generator=generator).to(device)
    if packs:
        long_alone = run(text_L[None], [long])[0]
        in_row_with_it = run(torch.cat([text_L, short_L]), [long, 7], equal_length_runs=((1, long), (1, 7)))[0]
        one_token = run(short_L, [1] * 7, equal_length_runs=((7, 1),))[0]
        return changes | {
            "packed_one_token": change(one_token, run(short_L[:, None], [1] * 7)[:, 0]),
            "packed_long": change(in_row_with_it[:long], long_alone),
            "packed_beside_long": change(in_row_with_it[long:], alone),
        }
    batch = F.pad(short_L, (0, long - 7)).expand(2, -1).clone()
    batch[0] = text_L
    return changes | {"beside_long": change(run(batch, [long, 7])[1, :7], alone)}


def _check_changes(changes: dict[str, float], attn: str, tolerance: float) -> None:
    if not torch.isfinite(torch.tensor(list(changes.values()))).all():
        raise AttentionError("attention probe: found states that are not finite; the weights may be damaged")
    bidirectional = changes["last_to_first"] > (1e-4 if tolerance > 1e-3 else 1e-6)
    if bidirectional != (attn == "bb"):
        found, wanted = ("bidirectional", "causal") if bidirectional else ("causal", "bidirectional")
        raise AttentionError(f"attention probe: --attn {attn} wants {wanted} attention, found it {found} ({changes})")
    for check, change in changes.items():
        if check != "last_to_first" and not change <= tolerance:
            cause = "a neighbour in the row" if check.startswith("packed") else "padding"
            raise AttentionError(
                f"attention probe: {cause} changes a text's states ({check}: {change:.1e} in relative norm, "
                f"wanted at most {tolerance:.0e}); try another --attn_implementation"
            )


# ---- families outside the table

_TRIED: dict[str, tuple[str, str]] = {}


def choose_attention(config: PreTrainedConfig, trust_remote_code: bool = False) -> tuple[str, str]:
    """The attention implementation of a family that is to be packed: "packed", or one that pads.

    One random layer of each kind of a family outside the table is probed on the CPU, and each of its weights must have
    a gradient, since DDP stops at one that has none.

    Returns:
        The implementation, and a line about a family outside the table; "" for one in it.
    Raises:
        UserError: no implementation passes, or a weight has no gradient.
    """
    kind = config.model_type
    if kind in FAMILIES and not (trust_remote_code and getattr(config, "auto_map", None)):
        return PACKED, ""
    key = config.to_json_string(use_diff=False)
    if key not in _TRIED:
        problems = []
        for implementation in (PACKED, "sdpa", "eager"):
            try:
                for layer in dict.fromkeys(getattr(config, "layer_types", None) or [None]):
                    _try_layer(config, layer, implementation, trust_remote_code)
            except Exception as error:  # any, since it is a model that nobody has tried
                problems.append(first_line(error))
                continue
            passed = f"{kind!r} is not among the tested families; a layer of each kind passes the attention probe"
            padded = f", but cannot be packed: it trains padded ({problems[0]})" if problems else ""
            _TRIED[key] = implementation, passed + padded
            break
        else:
            raise UserError(f"{kind!r} is not among the tested families, and its layers do not pass: {problems[-1]}")
    return _TRIED[key]


def _try_layer(config: PreTrainedConfig, kind: str | None, implementation: str, trust_remote_code: bool) -> None:
    backbone = one_layer(config, kind, implementation, trust_remote_code=trust_remote_code)
    embedder = Embedder(backbone, TextContract(normalized=False)).eval()
    probe_attention(embedder, embedder, torch.device("cpu"), "cc" if is_causal(config) else "bb")
    lengths = torch.tensor([8])
    embedder(input_ids=torch.arange(8)[None], lengths=lengths, prompt_lengths=lengths * 0).sum().backward()
    if unused := [name for name, weight in backbone.named_parameters() if weight.grad is None]:
        raise UserError(f"no vector depends on {len(unused)} of its weights, first {unused[0]!r}")
