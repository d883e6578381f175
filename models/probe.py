"""Test a model's attention on the kernel it really uses: direction, padding, packing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gritlm.errors import UserError
from gritlm.models.embedder import Embedder


class AttentionError(UserError):
    """The model's attention differs from the one asked for."""


@torch.no_grad()
def probe_attention(
    wrapped: nn.Module, embedder: Embedder, device: torch.device, attn: str, exact: bool = True
) -> dict[str, float]:
    """Check the attention of a model on random tokens, in well under a second.

    (a) Changing the last token changes the first token's state if attention is bidirectional, and only then. (b) A text
    has the same states in a padded batch as alone. (c) The ids of the padding do not matter. (d) A text has the same
    states in a packed row as alone, and its neighbours do not matter.

    Args:
        wrapped: the module to call: the embedder or an engine around it. Where calls are collective, on all ranks.
        embedder: the embedder inside.
        device: of the inputs.
        attn: the attention asked for: "bb" (bidirectional) or "cc" (causal).
        exact: false if the model computes in less than float32.
    Returns:
        The relative change of the states, in norm: "last_to_first" for (a), "padded" for (b), "leak" for (c), and for
        a model that packs "packed" and "packed_leak" for (d).
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

    changes = _measure_changes(run, embedder.config.vocab_size, embedder.packed, device)
    hook.remove()
    wrapped.train(was_training)
    _check_changes(changes, attn, exact)
    return changes


def _measure_changes(
    run: Callable[..., Tensor], vocabulary: int, packs: bool, device: torch.device
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
    return changes


def _check_changes(changes: dict[str, float], attn: str, exact: bool) -> None:
    if not torch.isfinite(torch.tensor(list(changes.values()))).all():
        raise AttentionError("attention probe: found states that are not finite; the weights may be damaged")
    bidirectional = changes["last_to_first"] > (1e-6 if exact else 1e-4)
    if bidirectional != (attn == "bb"):
        found, wanted = ("bidirectional", "causal") if bidirectional else ("causal", "bidirectional")
        raise AttentionError(f"attention probe: --attn {attn} wants {wanted} attention, found it {found} ({changes})")
    tolerance = 1e-5 if exact else 5e-2
    for check in changes.keys() - {"last_to_first"}:
        if not changes[check] <= tolerance:
            cause = "a neighbour in the row" if check.startswith("packed") else "padding"
            raise AttentionError(
                f"attention probe: {cause} changes a text's states ({check}: {changes[check]:.1e} in relative norm, "
                f"wanted at most {tolerance:.0e}); try another --attn_implementation"
            )
