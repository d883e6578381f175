"""The attention probe passes right models and refuses wrong ones."""

from dataclasses import replace

import pytest
import torch
from helpers import make_embedder

from gritlm.models import attention
from gritlm.models.probe import AttentionError, probe_attention


def probe(model, attn, exact=True):
    return probe_attention(model, model, torch.device("cpu"), attn, exact)


@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("attn", ["bb", "cc"])
@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_a_right_model_passes(base_model, attn, implementation, pooling):
    changes = probe(make_embedder(base_model, attn, implementation, pooling_method=pooling, projection=12), attn)
    assert (changes["last_to_first"] > 1e-3) == (attn == "bb")
    assert changes["leak"] == 0
    assert ("packed" in changes) == (implementation == "packed")


def test_a_right_model_passes_under_bf16(base_model):
    model = make_embedder(base_model)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    assert probe(model, "bb", exact=False)["last_to_first"] > 1e-3


@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager"])
def test_the_wrong_direction_is_refused(base_model, implementation):
    with pytest.raises(AttentionError, match="wants bidirectional attention, found it causal"):
        probe(make_embedder(base_model, "cc", implementation), "bb")
    with pytest.raises(AttentionError, match="wants causal attention, found it bidirectional"):
        probe(make_embedder(base_model, "bb", implementation), "cc")


def test_attention_to_padding_is_refused(base_model):
    model = make_embedder(base_model)
    forward = model.backbone.forward

    def without_mask(attention_mask=None, packing=None, **inputs):
        return forward(**inputs, packing=packing, attention_mask=attention_mask if packing else None)

    model.backbone.forward = without_mask
    with pytest.raises(AttentionError, match="padding changes a text's states"):
        probe(model, "bb")


def test_attention_between_packed_texts_is_refused(base_model):
    model = make_embedder(base_model)
    forward = model.backbone.forward

    def as_one_text(packing=None, **inputs):
        if packing:
            total = sum(count * length for count, length in packing.equal_length_runs)
            packing = replace(packing, equal_length_runs=((1, total),))
        return forward(**inputs, packing=packing)

    model.backbone.forward = as_one_text
    with pytest.raises(AttentionError, match="a neighbour in the row changes a text's states"):
        probe(model, "bb")


def test_damaged_weights_are_refused(qwen3):
    model = make_embedder(qwen3)
    with torch.no_grad():
        model.backbone.norm.weight[0] = float("nan")
    with pytest.raises(AttentionError, match="states that are not finite"):
        probe(model, "bb")


def test_the_probe_changes_neither_the_model_nor_the_random_state(base_model):
    model = make_embedder(base_model).train()
    state = torch.get_rng_state()
    probe(model, "bb")
    assert model.training
    assert not model.backbone._forward_hooks
    assert torch.equal(state, torch.get_rng_state())


def test_a_row_of_one_token_texts_has_a_look_of_its_own(base_model, monkeypatch):
    """On a GPU the kernel takes another branch for it."""
    right = attention._one_call_per_run

    def wrong_for_one_token(*call):
        output = right(*call)
        return output.roll(1, dims=1) if call[3].max_length == 1 else output

    monkeypatch.setattr(attention, "_one_call_per_run", wrong_for_one_token)
    with pytest.raises(AttentionError, match="packed_one_token"):
        probe(make_embedder(base_model), "bb")
