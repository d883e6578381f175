"""Attention: bidirectional where asked, padding without effect, and a probe that notices when it is not so."""

from dataclasses import replace

import pytest
import torch
from helpers import flat_gradient, make_embedder, relative
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, BertConfig, Qwen3Config

from gritlm.errors import UserError
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.embedder import Embedder
from gritlm.models.pooling import POOLING, pool
from gritlm.models.probe import AttentionError, probe_attention


def embedder(folder, attn="bb", implementation="packed", **options):
    return Embedder(load_backbone(str(folder), load_config(str(folder), attn), implementation), **options)


def probe(model, attn, exact=True):
    return probe_attention(model, model, torch.device("cpu"), attn, exact)


@pytest.fixture(params=["qwen2", "qwen3"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("attn", ["bb", "cc"])
@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_the_probe_passes(folder, attn, implementation, pooling):
    found = probe(embedder(folder, attn, implementation, pooling_method=pooling, projection=12), attn)
    assert (found["last_to_first"] > 1e-3) == (attn == "bb")
    assert found["leak"] == 0
    assert ("packed" in found) == (implementation == "packed")


@pytest.mark.parametrize("name", ["flash_attention_2", "fast"])
def test_an_attention_kernel_that_is_not_there(folder, name):
    with pytest.raises(UserError, match=f"--attn_implementation {name}: .*; packed works everywhere") as error:
        embedder(folder, implementation=name)
    assert "\n" not in str(error.value)


def test_the_probe_passes_under_bf16(folder):
    model = embedder(folder)
    forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
    assert probe(model, "bb", exact=False)["last_to_first"] > 1e-3


@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager"])
def test_the_probe_catches_a_causal_model(folder, implementation):
    with pytest.raises(AttentionError, match="wants bidirectional attention, found it causal"):
        probe(embedder(folder, "cc", implementation), "bb")
    with pytest.raises(AttentionError, match="wants causal attention, found it bidirectional"):
        probe(embedder(folder, "bb", implementation), "cc")


def test_the_probe_catches_a_padding_leak(folder):
    model = embedder(folder)
    forward = model.backbone.forward

    def careless(attention_mask=None, packing=None, **inputs):
        return forward(**inputs, packing=packing, attention_mask=attention_mask if packing else None)

    model.backbone.forward = careless
    with pytest.raises(AttentionError, match="padding changes a text's states"):
        probe(model, "bb")


def test_the_probe_catches_a_leak_between_packed_texts(folder):
    model = embedder(folder)
    forward = model.backbone.forward

    def as_one_text(packing=None, **inputs):
        packing = packing and replace(
            packing, equal_length_runs=((1, sum(count * length for count, length in packing.equal_length_runs)),)
        )
        return forward(**inputs, packing=packing)

    model.backbone.forward = as_one_text
    with pytest.raises(AttentionError, match="a neighbour in the row changes a text's states"):
        probe(model, "bb")


def test_the_probe_leaves_the_model_as_it_was(folder):
    model = embedder(folder).train()
    state = torch.get_rng_state()
    probe(model, "bb")
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


def packed_and_padded(texts: list[torch.Tensor], prompt_lengths: list[int]) -> list[dict]:
    """The same texts (longest first) as one packed row, and as a padded batch."""
    places = {"lengths": torch.tensor([len(t) for t in texts]), "prompt_lengths": torch.tensor(prompt_lengths)}
    equal_length_runs = tuple((1, len(t)) for t in texts)
    padded = pad_sequence(texts, batch_first=True)
    return [
        places | {"input_ids": torch.cat(texts), "equal_length_runs": equal_length_runs},
        places | {"input_ids": padded},
    ]


@pytest.mark.parametrize("attn", ["bb", "cc"])
@pytest.mark.parametrize("pooling", POOLING)
def test_packed_is_padded_is_alone(folder, attn, pooling):
    model = embedder(folder, attn, pooling_method=pooling, projection=12).eval()
    texts, prompt_lengths = [torch.randint(1, 600, (n,)) for n in (40, 17, 17, 3, 1)], [9, 0, 3, 2, 0]
    packed, padded = (model(**chunk) for chunk in packed_and_padded(texts, prompt_lengths))
    assert relative(packed, padded) < 1e-6
    for vector, text, skip in zip(packed, texts, prompt_lengths, strict=True):
        alone = model(text[None], torch.tensor([len(text)]), torch.tensor([skip]))
        assert relative(vector, alone[0]) < 1e-5
    assert torch.allclose(packed.norm(dim=1), torch.ones(5), atol=1e-6)


def test_packed_gradients(folder):
    texts = [torch.randint(1, 600, (n,)) for n in (40, 17, 17, 1)]
    gradients = []
    for chunk in packed_and_padded(texts, [9, 0, 3, 0]):
        model = embedder(folder)
        (model(**chunk) * torch.linspace(-1, 1, 4 * 32).view(4, 32)).sum().backward()
        gradients.append(flat_gradient(model))
    assert relative(*gradients) < 1e-5


def test_pooling_by_hand():
    states, lengths, prompt_lengths = torch.arange(18.0).view(6, 3), torch.tensor([2, 4]), torch.tensor([0, 2])
    assert torch.equal(pool(states, lengths, prompt_lengths, "mean")[1], (states[4] + states[5]) / 2)
    assert torch.allclose(pool(states, lengths, prompt_lengths, "weightedmean")[1], (3 * states[4] + 4 * states[5]) / 7)
    assert torch.equal(pool(states, lengths, prompt_lengths, "lasttoken"), states[[1, 5]])
    assert torch.equal(pool(states, lengths, prompt_lengths, "cls"), states[[0, 4]])


def test_reset_weight_is_the_models_own_initialisation(folder):
    config = load_config(str(folder))
    config.initializer_range = 0.02
    reset = load_backbone(str(folder), config, reset_weight=True, seed=1)
    loaded = embedder(folder).backbone
    for (name, value), trained in zip(reset.named_parameters(), loaded.parameters(), strict=True):
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value))
        elif name.endswith("bias"):
            assert torch.equal(value, torch.zeros_like(value))
        else:
            assert 0.015 < value.std() < 0.025
            assert not torch.allclose(value, trained)
    again = load_backbone(str(folder), config, reset_weight=True, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(reset.parameters(), again.parameters(), strict=True))


def test_saved_and_loaded_exactly(folder, tmp_path):
    model = make_embedder(folder, projection=12)
    model.save_weights(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).is_causal is False
    other = Embedder(load_backbone(str(folder), load_config(str(folder)), reset_weight=True), projection=12)
    other.load_weights(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    base, saved = (AutoModel.from_pretrained(path).state_dict().keys() for path in (folder, tmp_path))
    assert base == saved


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match=r"found no config\.json"):
        load_config(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="neither a model folder nor a model that the hub gives"):
        load_config("no-such/model")
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"found a 'bert' backbone, wanted one of \('qwen2', 'qwen3'\)"):
        load_config(str(tmp_path))
    Qwen3Config(use_sliding_window=True, max_window_layers=0, sliding_window=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="sliding-window"):
        load_config(str(tmp_path))
