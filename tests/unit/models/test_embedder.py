"""The embedder obeys its contract, and its weights are saved and loaded exactly."""

import pytest
import torch
from helpers import make_embedder
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from gritlm.errors import UserError


def equal_weights(model, other) -> bool:
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == name2 and torch.equal(value, value2) for (name, value), (name2, value2) in pairs)


def changed(folder, **options):
    """An embedder with other weights, the projection's included."""
    model = make_embedder(folder, **options)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2).add_(1)
    return model


def test_the_contract_decides_normalisation_and_the_projection_the_width(qwen3):
    chunk = {
        "input_ids": torch.arange(1, 9),
        "lengths": torch.tensor([5, 3]),
        "prompt_lengths": torch.tensor([0, 0]),
        "equal_length_runs": ((1, 5), (1, 3)),
    }
    unit = make_embedder(qwen3, projection=12).eval()
    plain = make_embedder(qwen3, normalized=False).eval()
    assert unit.embedding_dim == 12 and plain.embedding_dim == 32
    assert unit(**chunk).shape == (2, 12) and plain(**chunk).shape == (2, 32)
    assert torch.allclose(unit(**chunk).norm(dim=1), torch.ones(2), atol=1e-6)
    assert not torch.allclose(plain(**chunk).norm(dim=1), torch.ones(2), atol=1e-2)


@pytest.mark.parametrize("shard_size", ["50GB", "20kB"], ids=["one file", "shards"])
def test_weights_are_saved_and_loaded_exactly(base_model, tmp_path, shard_size):
    model = changed(base_model, projection=12)
    model.save_weights(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard_size == "20kB")
    other = make_embedder(base_model, projection=12)
    assert not equal_weights(model, other), "control: they differ before"
    own = [weight.data_ptr() for weight in other.parameters()]
    other.load_weights(tmp_path)
    assert equal_weights(model, other)
    assert own == [weight.data_ptr() for weight in other.parameters()], "the parameters were replaced"
    assert AutoConfig.from_pretrained(tmp_path).is_causal is False
    base, saved = (AutoModel.from_pretrained(folder).state_dict() for folder in (base_model, tmp_path))
    assert base.keys() == saved.keys()
    assert all(torch.equal(value, model.backbone.state_dict()[name]) for name, value in saved.items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norm.weight", None, r"weight 'norm\.weight': found shape None, wanted shape \[32\]"),
        ("more.weight", torch.ones(3), r"weight 'more\.weight': found shape \[3\], wanted shape None"),
        ("norm.weight", torch.ones(1), r"weight 'norm\.weight': found shape \[1\], wanted shape \[32\]"),
    ],
    ids=["missing", "unexpected", "another shape"],
)
def test_other_weights_are_refused_and_none_is_loaded(qwen3, tmp_path, name, value, message):
    changed(qwen3).save_weights(tmp_path)
    weights = {key: kept for key, kept in load_file(tmp_path / "model.safetensors").items() if key != name}
    save_file(weights | ({} if value is None else {name: value}), tmp_path / "model.safetensors")
    model = make_embedder(qwen3)
    with pytest.raises(UserError, match=message):
        model.load_weights(tmp_path)
    assert equal_weights(model, make_embedder(qwen3))


def test_a_missing_shard_and_a_missing_projection_are_refused(qwen3, tmp_path):
    model = make_embedder(qwen3)
    model.backbone.save_pretrained(tmp_path, max_shard_size="20kB")
    model.load_weights(tmp_path)
    min(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match="wanted shape"):
        model.load_weights(tmp_path)
    with pytest.raises(UserError, match=r"weight 'linear\.bias': found shape None, wanted shape \[12\]"):
        make_embedder(qwen3, projection=12).load_projection(tmp_path)


def test_a_projection_without_bias_gets_one_of_zero(qwen3, tmp_path):
    model, weight = make_embedder(qwen3, projection=12), torch.randn(12, 32)
    (tmp_path / "layer").mkdir()
    save_file({"linear.weight": weight}, tmp_path / "layer" / "model.safetensors")
    assert model.projection.bias.any(), "control"
    model.load_projection(tmp_path, "layer", bias=False)
    assert torch.equal(model.projection.weight, weight) and not model.projection.bias.any()
    with pytest.raises(UserError, match=r"weight 'linear\.bias': found shape None"):
        model.load_projection(tmp_path, "layer")
