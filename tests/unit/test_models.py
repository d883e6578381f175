"""Contract C1: bidirectional where asked, padding without effect, and a probe that notices when it is not so."""

import pytest
import torch
from helpers import make_embedder, relative
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, BertConfig, Qwen3Config

from gritlm.errors import UserError
from gritlm.models.backbone import AttentionError, load_backbone, load_config, probe_attention
from gritlm.models.embedder import Embedder
from gritlm.models.pooling import POOLING, pool


def embedder(folder, attn="bb", implementation="sdpa", **options):
    return Embedder(load_backbone(str(folder), load_config(str(folder), attn), implementation), **options)


def probe(model, attn, exact=True):
    return probe_attention(model, model.config.vocab_size, torch.device("cpu"), attn, exact)


@pytest.fixture(params=["qwen2", "qwen3"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attn", ["bb", "cc"])
@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_the_probe_passes(folder, attn, implementation, pooling):
    found = probe(embedder(folder, attn, implementation, pooling_method=pooling, projection=12), attn)
    assert (found["last_to_first"] > 1e-3) == (attn == "bb")
    assert found["leak"] == 0


def test_the_probe_passes_under_bf16(folder):
    model = embedder(folder)
    forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
    assert probe(model, "bb", exact=False)["last_to_first"] > 1e-3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_probe_catches_a_causal_model(folder, implementation):
    with pytest.raises(AttentionError, match="wants bidirectional attention, found it causal"):
        probe(embedder(folder, "cc", implementation), "bb")
    with pytest.raises(AttentionError, match="wants causal attention, found it bidirectional"):
        probe(embedder(folder, "bb", implementation), "cc")


def test_the_probe_catches_a_padding_leak(folder):
    model = embedder(folder)
    forward = model.backbone.forward
    model.backbone.forward = lambda input_ids, attention_mask, **more: forward(input_ids=input_ids, **more)
    with pytest.raises(AttentionError, match="padding changes a text's vector"):
        probe(model, "bb")


def test_the_probe_leaves_the_model_as_it_was(folder):
    model = embedder(folder).train()
    state = torch.get_rng_state()
    probe(model, "bb")
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("pooling", POOLING)
def test_padded_is_unpadded(folder, pooling):
    model = make_embedder(folder, pooling_method=pooling, projection=12).eval()
    texts = [torch.randint(1, 600, (n,)) for n in (3, 17, 1, 40)]
    ids = pad_sequence(texts, batch_first=True)
    mask = pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
    together = model(ids, mask, mask.bool())
    for vector, text in zip(together, texts, strict=True):
        one = torch.ones_like(text)[None]
        assert relative(vector, model(text[None], one, one.bool())[0]) < 1e-5
    assert torch.allclose(together.norm(dim=1), torch.ones(4), atol=1e-6)


def test_pooling_by_hand():
    states = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    assert torch.equal(pool(states, mask, "mean")[0], (states[0, 1] + states[0, 2]) / 2)
    assert torch.allclose(pool(states, mask, "weightedmean")[0], (2 * states[0, 1] + 3 * states[0, 2]) / 5)
    assert torch.equal(pool(states, mask, "lasttoken"), torch.stack([states[0, 2], states[1, 3]]))
    assert torch.equal(pool(states, mask, "cls"), torch.stack([states[0, 1], states[1, 0]]))


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
