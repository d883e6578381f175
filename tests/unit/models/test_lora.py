"""LoRA and QLoRA on tiny models: attached, saved, loaded, merged; what does not fit is refused."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import make_embedder
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from gritlm.errors import UserError
from gritlm.gritlm import GritLM
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.base_files import Base
from gritlm.models.embedder import Embedder
from gritlm.models.folder import save_model_folder
from gritlm.models.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    QUANTISED_BASE,
    adapter_shapes,
    dequantise,
    make_config,
    match_targets,
    merge,
    quantised_bytes,
)
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer
from gritlm.training.adapters import probe_vectors

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one - other).abs().max().item() < 2e-6


def adapted(model: Path, base: str | None = None, endings=None, quantised: bool = False, **options) -> Embedder:
    """A model with an adapter that changes its vectors."""
    embedder = make_embedder(model, **options)
    endings = endings or match_targets(embedder.config, None)
    embedder.add_adapter(make_config(4, 8, 0.1, endings, base or str(model)))
    if quantised:
        embedder.quantise(torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in embedder.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.2, generator=generator)
    return embedder


def save(embedder: Embedder, model: Path, folder: Path) -> Path:
    tokenizer = TextTokenizer(load_tokenizer(str(model), embedder.contract), embedder.contract)
    save_model_folder(embedder, tokenizer, folder)
    return folder


def test_merged_equals_the_adapter_and_not_the_base(base_model):
    embedder = adapted(base_model)
    base, tuned = probe_vectors(make_embedder(base_model)), probe_vectors(embedder)
    merge(embedder.backbone)
    assert close(probe_vectors(embedder), tuned) and not close(tuned, base)
    plain = make_embedder(base_model)
    assert embedder.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in embedder.parameters())


def test_only_the_adapter_and_the_projection_are_trained(qwen3):
    embedder = adapted(qwen3, endings=["q_proj", "down_proj"], projection=16)
    assert {name.split(".")[0] for name in embedder.trained_state()} == {"backbone", "projection"}
    trained = [list(p.shape) for p in embedder.backbone.parameters() if p.requires_grad]
    shapes = adapter_shapes(embedder.config, make_config(4, 8, 0.1, ["q_proj", "down_proj"]))
    assert trained == list(shapes.values())
    assert len(trained) == 2 * 2 * embedder.config.num_hidden_layers
    one, other = adapted(qwen3), adapted(qwen3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)), "by the seed"


def test_an_adapter_folder_is_a_model_everywhere(qwen3, tmp_path):
    embedder = adapted(qwen3, projection=16)
    tuned = probe_vectors(embedder)
    folder = save(embedder, qwen3, tmp_path / "adapter")
    assert {path.name for path in folder.rglob("*.safetensors")} == {ADAPTER_WEIGHTS, "model.safetensors"}
    assert not (folder / "model.safetensors").exists(), "that of the projection only"
    assert close(probe_vectors(GritLM(folder).model), tuned)
    assert not close(probe_vectors(make_embedder(qwen3, projection=16)), tuned), "control"

    # As its card says.
    backbone = AutoModel.from_pretrained(qwen3, config=AutoConfig.from_pretrained(folder))
    peft = PeftModel.from_pretrained(backbone, folder).eval()
    ids = torch.arange(3, 12)
    states = peft(input_ids=ids[None])[0][0]
    lengths = torch.tensor([9])
    ours = embedder(ids, lengths, torch.zeros_like(lengths), ((1, 9),))
    assert close(nn.functional.normalize(embedder.projection(states.mean(0)), dim=0), ours[0])

    # Again, into an embedder that has another one.
    other = make_embedder(qwen3, projection=16)
    other.add_adapter(make_config(4, 8, 0.1, match_targets(other.config, None)), seed=5)
    other.load_weights(folder)
    assert close(probe_vectors(other), tuned)


def test_an_adapter_of_a_language_model_and_one_on_another(qwen3, tmp_path):
    """peft's names there have one `model.` more. An adapter may have an adapter as its base."""
    embedder = adapted(qwen3)
    tuned = probe_vectors(embedder)
    folder = save(embedder, qwen3, tmp_path / "first")
    found = load_file(folder / ADAPTER_WEIGHTS)
    longer = {name.replace("base_model.model.", "base_model.model.model."): value for name, value in found.items()}
    save_file(longer, folder / ADAPTER_WEIGHTS)
    (folder / "config.json").unlink()  # as peft leaves it
    backbone = load_backbone(str(folder), load_config(str(folder), "bb"))
    assert close(probe_vectors(Embedder(backbone, TextContract())), tuned)
    assert Base(str(folder), PreTrainedConfig()).fingerprint != Base(str(qwen3), PreTrainedConfig()).fingerprint

    second = save(adapted(folder), qwen3, tmp_path / "second")
    backbone = load_backbone(str(second), load_config(str(second), "bb"))
    twice = probe_vectors(Embedder(backbone, TextContract()))
    assert close(twice, probe_vectors(adapted(folder))) and not close(twice, tuned)


@needs_bitsandbytes
def test_qlora_is_published_as_it_was_trained(qwen3, tmp_path):
    embedder = adapted(qwen3, quantised=True)
    layer = embedder.backbone.layers[0].mlp.up_proj.base_layer
    weight, state = layer.weight, layer.weight.quant_state
    stored = weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert stored == quantised_bytes(layer.in_features * layer.out_features)
    in_floats, tuned = probe_vectors(adapted(qwen3)), probe_vectors(embedder)
    folder = save(embedder, qwen3, tmp_path / "adapter")
    assert (folder / QUANTISED_BASE).is_file()
    dequantise(embedder.backbone)
    merge(embedder.backbone)
    assert close(probe_vectors(embedder), tuned)
    assert not close(in_floats, tuned), "control: the adapter on the base as it was"
    assert close(probe_vectors(GritLM(folder).model), tuned)
    (folder / QUANTISED_BASE).unlink()
    assert close(probe_vectors(GritLM(folder).model), in_floats), "control"
    assert all(p.dtype == torch.float32 for p in embedder.parameters())


def without(name: str):
    return lambda folder: save_file(
        {n: v for n, v in load_file(folder / ADAPTER_WEIGHTS).items() if name not in n}, folder / ADAPTER_WEIGHTS
    )


def with_more(**tensors):
    return lambda folder: save_file(load_file(folder / ADAPTER_WEIGHTS) | tensors, folder / ADAPTER_WEIGHTS)


def settings(**changed):
    def write(folder: Path) -> None:
        found = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps({k: v for k, v in (found | changed).items() if v != "-"}))

    return write


DAMAGED = {
    "a tensor is missing": (without("0.mlp.up_proj.lora_B"), "found no 'layers.0.mlp.up_proj.lora_B"),
    "a tensor too many": (with_more(**{"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}), "found 'lm_head"),
    "another rank": (settings(r=8), "that does not fit the base"),
    "cut short": (lambda f: (f / ADAPTER_WEIGHTS).write_bytes(b"{}"), "that does not fit the base"),
    "another method": (settings(peft_type="IA3", r="-"), "an adapter of the type IA3"),
    "whole modules": (settings(modules_to_save=["embed_tokens"]), "found modules_to_save, wanted LoRA alone"),
    "no base": (settings(base_model_name_or_path=None), "no base_model_name_or_path"),
    "a base that is gone": (settings(base_model_name_or_path="/gone"), "for the base '/gone', and no such folder"),
    "whole weights beside it": (lambda f: shutil.copy(f / "2_Dense/model.safetensors", f), "beside whole weights"),
}


@pytest.fixture(scope="module")
def saved(qwen3, tmp_path_factory) -> Path:
    return save(adapted(qwen3, projection=16), qwen3, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("case", DAMAGED)
def test_what_does_not_fit_is_refused(saved, tmp_path, case):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    damage, message = DAMAGED[case]
    damage(folder)
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as raised:
        load_backbone(str(folder), load_config(str(folder), "bb"))
    assert "\n" not in str(raised.value)


def test_targets_are_linear_layers(qwen3):
    config = load_config(str(qwen3), "bb")
    kinds = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert match_targets(config, None) == kinds
    assert match_targets(config, ["v_proj", "1.mlp.up_proj", "v_proj"]) == ["1.mlp.up_proj", "v_proj"]
    for wrong in ("wq", "embed_tokens", "proj", "input_layernorm"):
        with pytest.raises(UserError, match=f"found '{wrong}', wanted names of linear layers.*: down_proj, gate_proj"):
            match_targets(config, ["q_proj", wrong])


def test_a_fingerprint_tells_bases_apart(qwen3, tmp_path):
    shutil.copytree(qwen3, tmp_path / "other")
    print_of = lambda folder: Base(str(folder), PreTrainedConfig()).fingerprint  # noqa: E731
    assert print_of(qwen3) == print_of(tmp_path / "other") != ""
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["layers.1.mlp.up_proj.weight"] *= 1.001
    save_file(weights, tmp_path / "other" / "model.safetensors")
    assert print_of(qwen3) != print_of(tmp_path / "other")
