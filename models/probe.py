"""Prove by probe that a model's attention is what was asked for, on the kernel really in use."""

import torch
from torch import Tensor, nn

from gritlm.errors import UserError


class AttentionError(UserError):
    """The attention in use is not the attention asked for."""


@torch.no_grad()
def probe_attention(encoder: nn.Module, embedder: nn.Module, device: torch.device, attn: str, exact: bool = True):
    """Prove that attention is what was asked for on the kernel really in use, in well under a second.

    (a) changing the last token moves token 0 (and must not when `attn` is "cc"); (b) a text in a padded batch gets the
    states it gets alone; (c) what stands under the padding leaks nowhere; (d) a packed text gets the states it gets
    alone, and its neighbours leak nowhere.

    Args:
        encoder: what is called: the embedder, alone or inside an engine; by all ranks at once where that asks for it.
        embedder: the `Embedder` itself.
        device: where the encoder takes its input.
        attn: bb or cc, what is wanted.
        exact: false where it computes in less than float32.
    Returns:
        the relative changes, in norm: {"last_to_first", "padded", "leak"}, and where texts are packed "packed" and
        "packed_leak".
    Raises:
        AttentionError: naming the check that failed, what was found and what was wanted.
    """
    vocabulary = embedder.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    long_L, other_L = (torch.randint(0, vocabulary, (12,), generator=generator).to(device) for _ in range(2))
    short_L = torch.randint(0, vocabulary, (7,), generator=generator).to(device)
    changed_L = long_L.clone()
    changed_L[-1] = (long_L[-1] + 1) % vocabulary
    captured: list[Tensor] = []

    def states(input_ids: Tensor, lengths: list[int], **more) -> Tensor:
        places = torch.tensor(lengths, device=device)
        encoder(input_ids=input_ids, lengths=places, prompt_lengths=torch.zeros_like(places), **more)
        return captured.pop().float()

    def padded(filler: int) -> Tensor:
        batch = torch.full((2, 12), filler, device=device)
        batch[0], batch[1, :7] = long_L, short_L
        return states(batch, [12, 7])[1, :7]

    def packed(neighbour_L: Tensor) -> Tensor:
        row = torch.cat([neighbour_L, short_L, neighbour_L[:7]])
        return states(row, [12, 7, 7], equal_length_runs=((1, 12), (2, 7)))[0, 12:19]

    was_training = encoder.training
    encoder.eval()
    hook = embedder.backbone.register_forward_hook(lambda module, inputs, output: captured.append(output[0]))
    alone = states(short_L[None], [7])[0]
    in_batch, in_batch_otherwise = padded(0), padded(vocabulary - 1)
    if embedder.packed:
        first, first_changed = (states(ids, [12], equal_length_runs=((1, 12),))[0, 0] for ids in (long_L, changed_L))
        in_row, in_row_otherwise = packed(long_L), packed(other_L)
    else:
        first, first_changed = (states(ids[None], [12])[0, 0] for ids in (long_L, changed_L))
    hook.remove()
    encoder.train(was_training)

    def change(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    found = {
        "last_to_first": change(first_changed, first),
        "padded": change(in_batch, alone),
        "leak": change(in_batch_otherwise, in_batch),
    }
    if embedder.packed:
        found |= {"packed": change(in_row, alone), "packed_leak": change(in_row_otherwise, in_row)}
    if not torch.isfinite(torch.tensor(list(found.values()))).all():
        raise AttentionError("attention probe: the model's states are not finite; are its weights whole?")
    noise = 1e-5 if exact else 5e-2
    sees_ahead = found["last_to_first"] > (1e-6 if exact else 1e-4)
    if sees_ahead != (attn == "bb"):
        is_, wanted = ("bidirectional", "causal") if sees_ahead else ("causal", "bidirectional")
        raise AttentionError(f"attention probe: --attn {attn} wants {wanted} attention, found it {is_} ({found})")
    for check in found.keys() - {"last_to_first"}:
        if not found[check] <= noise:
            what = "a neighbour in the row" if check.startswith("packed") else "padding"
            raise AttentionError(
                f"attention probe: {what} changes a text's states ({check}: {found[check]:.1e} in relative norm, "
                f"wanted at most {noise:.0e}); try another --attn_implementation"
            )
    return found
