"""Loading a backbone: its config, its weights, and models and kernels that are refused."""

import json
import shutil

import pytest
import torch
from helpers import make_embedder

from gritlm.errors import UserError
from gritlm.models.backbone import load_backbone, load_config


def test_attn_sets_is_causal_and_none_keeps_it(qwen3, tmp_path):
    assert load_config(str(qwen3), "bb").is_causal is False
    assert load_config(str(qwen3), "cc").is_causal is True
    for is_causal in (True, False):
        config = json.loads((qwen3 / "config.json").read_text()) | {"is_causal": is_causal}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_config(str(tmp_path), None).is_causal is is_causal
    with pytest.raises(UserError, match=r"found no is_causal in its config\.json"):
        load_config(str(qwen3), None)


@pytest.mark.parametrize("name", ["flash_attention_2", "fast"])
def test_a_missing_attention_kernel_is_refused_in_one_line(qwen3, name):
    with pytest.raises(UserError, match=f"--attn_implementation {name}: .*; packed works everywhere") as error:
        make_embedder(qwen3, implementation=name)
    assert "\n" not in str(error.value)


def test_reset_weight_draws_from_the_models_own_initialisation(base_model):
    config = load_config(str(base_model), "bb")
    config.initializer_range = 0.02
    reset = load_backbone(str(base_model), config, reset_weight=True, seed=1)
    loaded = load_backbone(str(base_model), config)
    for (name, value), trained in zip(reset.named_parameters(), loaded.parameters(), strict=True):
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value))
        elif name.endswith("bias"):
            assert torch.equal(value, torch.zeros_like(value))
        else:
            assert 0.015 < value.std() < 0.025
            assert not torch.allclose(value, trained)
    again = load_backbone(str(base_model), config, reset_weight=True, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(reset.parameters(), again.parameters(), strict=True))


def test_models_that_cannot_be_loaded_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"found no config\.json"):
        load_config(str(tmp_path / "absent"), "bb")
    with pytest.raises(
        UserError, match=r"no-such/model: found no such folder, and no config\.json of a model of this name"
    ):
        load_config("no-such/model", "bb")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "no-such/base"}')
    with pytest.raises(UserError, match=r"found an adapter for the base 'no-such/base': no-such/base: found no such"):
        load_config(str(tmp_path), "bb")


def test_damaged_weights_are_refused_in_one_line(qwen3, tmp_path):
    folder = shutil.copytree(qwen3, tmp_path / "base")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = load_config(str(folder), "bb")
    with pytest.raises(UserError, match=r"model\.safetensors: found \d+ bytes that cannot be read") as error:
        load_backbone(str(folder), config)
    assert "\n" not in str(error.value)
    load_backbone(str(folder), config, reset_weight=True)
