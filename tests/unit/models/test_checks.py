"""A base model is refused before its weights are read, in one line that names the file and the field."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from helpers import run, train_flags
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gritlm.errors import UserError
from gritlm.models.backbone import load_config
from gritlm.models.base_files import INDEX, WEIGHTS
from gritlm.models.checks import MODEL, SAVED_WEIGHTS, UNUSED, check_base, check_tokenizer, check_tokenizer_files
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import load_tokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064d}\nsize 99296\n"
FIRST_SHARD = "model-00001-of-00002.safetensors"


def check(name: str | Path, **options) -> list[str]:
    """All checks, in the order in which `gritlm plan` makes them."""
    config = load_config(str(name), "bb")
    lines = check_base(str(name), config, **options)
    check_tokenizer_files(str(name))
    check_tokenizer(str(name), load_tokenizer(str(name), TextContract()), config)
    return lines


# ---- ways to break a folder


def edit(file: str = "config.json", remove: str = "", **values):
    def breaks(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | values
        content.pop(remove, None)
        (folder / file).write_text(json.dumps(content))

    return breaks


def write(file: str, content: str):
    return lambda folder: (folder / file).write_text(content)


def delete(*files: str):
    return lambda folder: [(folder / file).unlink() for file in files]


def rename(file: str, name: str):
    return lambda folder: (folder / file).rename(folder / name)


def cut(file: str):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def weights(change):
    """Save the weights that `change` makes of the saved ones, by name."""
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def added(name: str, *shape: int):
    return weights(lambda saved: saved | {name: torch.ones(shape)})


def shard(then):
    """Split the weights into two shards, then break one."""

    def breaks(folder: Path) -> None:
        whole = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = {FIRST_SHARD: list(whole)[:5], FIRST_SHARD.replace("1", "2", 1): list(whole)[5:]}
        for file, part in names.items():
            save_file({name: whole[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in names.items() for name in part}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        then(folder)

    return breaks


def without(name: str):
    return lambda saved: {key: value for key, value in saved.items() if key != name}


def prefixed(saved):
    return {f"module.{name}": value for name, value in saved.items()}


def in_8_bits(name: str):
    return lambda saved: saved | {name: saved[name].to(torch.float8_e4m3fn)}


def add_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), TextContract())
    tokenizer.add_tokens([f"<{i}>" for i in range(600)])
    tokenizer.save_pretrained(folder)


def add_a_pad_token(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), TextContract())
    edit(vocab_size=len(tokenizer))(folder)
    weights(lambda saved: saved | {"embed_tokens.weight": saved["embed_tokens.weight"][: len(tokenizer)].clone()})(
        folder
    )
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)


def rope(kind: str, **values):
    return edit(rope_parameters={"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, **values})


def layers(count: int):
    return edit(num_hidden_layers=count, layer_types=["full_attention"] * count)


def all_of(*steps):
    return lambda folder: [step(folder) for step in steps]


UP = "layers.0.mlp.up_proj.weight"
LORA = write("adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "no-such/base"}))
NO_BASE = r"found an adapter for the base 'no-such/base': no-such/base: found no such folder"
GPTQ, FULL = {"quant_method": "gptq"}, [1.0] * 4
WHOLE = r"/model\.safetensors: found \d+ bytes that cannot be read \(.*\), wanted a whole safetensors file"
TOKENIZER, BPE = "tokenizer.json", {"type": "BPE", "vocab": {}, "merges": []}

# The check that refuses a folder and how the folder is broken -> that, and what the message has.
BROKEN = {
    "adapter": (all_of(delete("config.json", WEIGHTS), LORA), NO_BASE),
    "adapter: beside the weights": (LORA, r"found adapter_config\.json without a base, or beside whole weights"),
    "adapter: without a config": (write("adapter_model.safetensors", ""), "found adapter_model.safetensors"),
    "quantisation": (edit(quantization_config=GPTQ), r"found quantization_config \(gptq\) in config\.json"),
    "rope_type: dynamic": (rope("dynamic"), r"found rope_type 'dynamic' in config\.json, wanted one of default, "),
    "rope_type: longrope": (rope("longrope", short_factor=FULL, long_factor=FULL), "rope_type 'longrope'"),
    "rope_type: mrope": (edit("config.json", "rope_parameters", rope_scaling={"type": "mrope"}), "rope_type 'mrope'"),
    "pad_token_id": (edit(pad_token_id=600), r"found pad_token_id 600 in config\.json, wanted .* vocab_size 600"),
    "buildable: activation": (edit(hidden_act="zelu"), r"that no model can be built from \(KeyError: .*zelu"),
    "weights_exist: none": (delete(WEIGHTS), r"found no weights, wanted model\.safetensors, or"),
    "weights_exist: pickled": (rename(WEIGHTS, "pytorch_model.bin"), r"found pytorch_model\.bin, wanted .* converts"),
    "weights_exist: no index": (shard(delete(INDEX)), f"found {FIRST_SHARD}, .*, wanted .* {INDEX} and its shards"),
    "layer_count: fewer": (layers(1), r"found 2 layers in the weights, wanted 1 \(num_hidden_layers in config\.json"),
    "layer_count: more": (layers(3), "found 2 layers in the weights, wanted 3"),
    "missing_weights": (weights(without(UP)), f"1 weights are missing, first '{UP}'"),
    "missing_weights: prefix": (weights(prefixed), "24 weights are missing, first .*; found 'module.embed_tokens"),
    "dtypes": (weights(in_8_bits(UP)), f"found weight '{UP}' in F8_E4M3, wanted F64, F32, F16, BF16"),
    "shapes: rows": (edit(vocab_size=700), r"of shape \[600, 32\], wanted \[700, 32\] \(config.json, vocab_size 700\)"),
    "shapes: width": (edit(intermediate_size=48), r"intermediate_size 48\); 5 more differ"),
    "unread_weights: bias": (added("layers.1.mlp.up_proj.bias", 64), "1 weights .* leaves out, .*up_proj.bias'"),
    "unread_weights: switch": (added("layers.1.self_attn.q_proj.bias", 32), r"\(attention_bias False\), first"),
    "unread_weights: adapter": (added("layers.1.mlp.up_proj.lora_A.weight", 2, 32), "up_proj.lora_A.weight', wanted"),
    "cut short": (cut(WEIGHTS), WHOLE),
    "empty": (write(WEIGHTS, ""), WHOLE),
    "pointer": (write(WEIGHTS, POINTER), f"/{WEIGHTS}: found a git-lfs pointer, .*: run git lfs pull"),
    "shard cut short": (shard(cut(FIRST_SHARD)), rf"/{FIRST_SHARD}: found \d+ bytes that cannot be read"),
    "shard's pointer": (shard(write(FIRST_SHARD, POINTER)), f"/{FIRST_SHARD}: found a git-lfs pointer"),
    "shard lost": (shard(delete(FIRST_SHARD)), f"/{INDEX}: found no {FIRST_SHARD} beside it, wanted every shard"),
    "index cut short": (shard(cut(INDEX)), f"/{INDEX}: found .* wanted a whole JSON file"),
    "config cut short": (cut("config.json"), r"/config\.json: found .* that cannot be read .*not a valid JSON file"),
    "config's pointer": (write("config.json", POINTER), r"/config\.json: found a git-lfs pointer"),
    "rope without factor": (edit(rope_parameters={"rope_type": "linear"}), r"/config\.json: .*'linear': {'factor'}"),
    "width in words": (edit(hidden_size="wide"), r"/config\.json: .*'hidden_size' expected int, got str"),
    "no tokenizer": (delete(TOKENIZER, "tokenizer_config.json"), r"found no tokenizer\.json, wanted a model with its"),
    "no merges": (all_of(delete(TOKENIZER), write("vocab.json", "{}")), r"found no tokenizer\.json"),
    "newer tokenizer": (
        edit(TOKENIZER, model={"type": "New"}),
        r"untagged enum.* wanted a tokenizer that tokenizers \d",
    ),
    "tokenizer's pointer": (write(TOKENIZER, POINTER), r"/tokenizer\.json: found a git-lfs pointer"),
    "tokenizer_config cut short": (
        cut("tokenizer_config.json"),
        r"/tokenizer_config\.json: found .* a whole JSON file",
    ),
    "empty tokenizer": (edit(TOKENIZER, model=BPE), "found a tokenizer without tokens"),
    "tokens without a row": (add_tokens, r"found \d+ tokens .*, first .*, wanted ids below 600 \(vocab_size"),
    "pad token without a row": (add_a_pad_token, r"found 1 tokens .* with the pad token '<pad>' \(id \d+\), wanted"),
}


@pytest.fixture
def folder(qwen3, tmp_path):
    return shutil.copytree(qwen3, tmp_path / "base")


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_base_is_refused_in_one_line(folder, case):
    breaks, message = BROKEN[case]
    assert check(folder) == []
    breaks(folder)
    with pytest.raises(UserError, match=message) as refused:
        check(folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


def test_every_check_refuses_a_broken_base():
    refused = {case.split(":")[0] for case in BROKEN}
    assert refused >= {check.__name__ for check in (*MODEL, *SAVED_WEIGHTS)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", ["1GB", "50KB"], ids=["one file", "shards"])
def test_a_language_model_as_it_comes_from_the_hub_passes(base_model, tmp_path, tied, size):
    folder = shutil.copytree(base_model, tmp_path / "base", ignore=shutil.ignore_patterns(WEIGHTS))
    config = load_config(str(base_model), "bb")
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=size)
    assert (folder / INDEX).exists() == (size == "50KB")
    (folder / "pytorch_model.bin").write_text("the same weights in the old form, which nothing reads")
    assert check(folder) == []


@pytest.mark.parametrize(
    "changes",
    [
        rope("yarn", original_max_position_embeddings=256),
        rope("linear"),
        edit(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}),
        edit(pad_token_id=599),
        added("layers.0.self_attn.rotary_emb.inv_freq", 4),
    ],
    ids=["yarn", "linear", "yarn as older versions wrote it", "the last id pads", "saved rotary frequencies"],
)
def test_what_a_whole_base_may_have(folder, changes):
    changes(folder)
    assert check(folder) == []


def test_what_a_run_does_not_use_is_named(folder):
    assert check(folder) == []
    edit(auto_map={"AutoModel": "modeling_qwen.Qwen3Model"})(folder)
    (code,) = check(folder)
    assert code.startswith("the base brings its own code (auto_map in config.json): transformers' own classes are used")
    (code,) = check(folder, trust_remote_code=True)
    assert code.endswith("the run uses it, but the saved folder will not hold it")
    added("score.weight", 1, 32)(folder)
    _, head = check(folder)
    assert head == "weights outside the backbone are not used: 'score.weight'"
    assert len(UNUSED) == 3, "the third: weights to come"


def test_weights_that_will_not_be_read_are_not_checked(folder):
    cut(WEIGHTS)(folder)
    assert check(folder, reset_weight=True) == []
    delete(WEIGHTS)(folder)
    assert check(folder, reset_weight=True) == []
    edit(quantization_config={"quant_method": "gptq"})(folder)
    with pytest.raises(UserError, match="quantization_config"):
        check(folder, reset_weight=True)


def test_a_model_of_the_hub_is_checked_once_it_is_in_the_cache(qwen3, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit, model = "0" * 40, tmp_path / "models--some--base"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    folder = shutil.copytree(qwen3, model / "snapshots" / commit)
    assert check("some/base") == []
    edit(vocab_size=700)(folder)
    with pytest.raises(UserError, match=r"--model_name_or_path some/base: found weight 'embed_tokens\.weight' of"):
        check("some/base")
    delete(WEIGHTS)(folder)
    assert check("some/base") == ["its weights are not in the cache of the hub: a run downloads them"]
    with pytest.raises(
        UserError, match=r"some/base: found no such folder, and no model\.safetensors of a model of this"
    ):
        check("some/base", download=True)


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_a_command_refuses_a_broken_base_in_one_line(folder, data, tmp_path, verb):
    cut(WEIGHTS)(folder)
    flags = train_flags(folder, data, tmp_path / "out", tmp_path / "cache")
    done = run("-m", "gritlm", verb, *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"gritlm: error: {folder / WEIGHTS}: found \d+ bytes that cannot be read .*\n", done.stderr)
    assert not (tmp_path / "cache").exists()
