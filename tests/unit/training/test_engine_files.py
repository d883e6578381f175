"""Engine files that contradict the flags, or ask for what no test covers, are refused in one line."""

import json
import re

import pytest
from helpers import ROOT, train_flags

from gritlm.cli import run_verb
from gritlm.errors import UserError
from gritlm.training import plan
from gritlm.training.engine_files import check_engine_file

ENGINE_FILES = {
    "no JSON": ("deepspeed", "{", "no JSON"),
    "no object": ("fsdp_config", "[]", "found list, wanted a JSON object"),
    "no object within": ("deepspeed", '{"zero_optimization": true}', "zero_optimization: found bool, wanted a JSON"),
    "no ZeRO": ("deepspeed", '{"zero_optimization": {"stage": 0}}', "zero_optimization.stage"),
    "clipping unsaid": ("deepspeed", '{"zero_optimization": {"stage": 2}}', "DeepSpeed's own default is 1.0"),
    "fsdp 1": ("fsdp_config", '{"version": 1}', "version"),
}


GIVEN = {"bf16": True, "max_grad_norm": 1.0}


@pytest.mark.parametrize("name", ENGINE_FILES)
def test_engine_files_that_no_test_has_seen(tmp_path, name):
    flag, text, message = ENGINE_FILES[name]
    path = tmp_path / "engine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--{flag}.*{re.escape(message)}"):
        check_engine_file(flag, str(path), GIVEN)


SUMS_IN_BFLOAT16 = 'put in "torch_autocast": {"enabled": "auto", "dtype": "bfloat16"'
# setting of DeepSpeed's file, value, what is said
CONTRADICTIONS = (
    ("bf16.enabled", "auto", SUMS_IN_BFLOAT16),
    ("bf16.enabled", True, SUMS_IN_BFLOAT16),
    ("bf16.enabled", False, SUMS_IN_BFLOAT16),
    ("fp16.enabled", "auto", SUMS_IN_BFLOAT16),
    ("torch_autocast.enabled", False, "found false, wanted auto; --bf16 decides"),
    ("torch_autocast.dtype", "float16", 'found "float16", wanted bfloat16'),
    ("torch_autocast.lower_precision_safe_modules", ["torch.nn.Linear"], "would be reduced in bfloat16"),
    ("communication_data_type", "bf16", 'found "bf16", wanted fp32'),
    ("data_types.grad_accum_dtype", "bf16", 'found "bf16", wanted fp32'),
    ("zero_optimization.offload_param", {"device": "cpu"}, "wanted it left out"),
    ("zero_optimization.zero_quantized_gradients", True, "wanted it left out"),
    ("gradient_accumulation_steps", 2, "found 2, wanted 1"),
    ("gradient_clipping", 0.5, "found 0.5, wanted auto; --max_grad_norm decides"),
    ("train_micro_batch_size_per_gpu", 8, "found 8, wanted auto; --global_batch_size decides"),
    ("train_batch_size", 8, "found 8, wanted auto; --global_batch_size decides"),
    ("optimizer", {"type": "AdamW"}, "wanted it left out; --optim and --learning_rate decide"),
    ("scheduler", {"type": "WarmupLR"}, "wanted it left out; --lr_scheduler_type decides"),
    ("compression_training", {"weight_quantization": {}}, "found a setting that no test covers"),
)


@pytest.mark.parametrize(("key", "value", "message"), CONTRADICTIONS)
def test_a_deepspeed_file_that_contradicts_the_flags(tmp_path, key, value, message):
    config = json.loads((ROOT / "scripts/parallel/zero2.json").read_text())
    section, _, inner = key.rpartition(".")
    (config.setdefault(section, {}) if section else config)[inner] = value
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"^--deepspeed .*{re.escape(key)}.*{re.escape(message)}"):
        check_engine_file("deepspeed", str(path), GIVEN)


def test_a_deepspeed_file_that_agrees_with_the_flags(tmp_path):
    config = json.loads((ROOT / "scripts/parallel/zero2.json").read_text())
    path = tmp_path / "zero.json"
    agreeing = {"torch_autocast": {"enabled": True}, "gradient_clipping": 1.0, "steps_per_print": 10}
    path.write_text(json.dumps(config | agreeing))
    check_engine_file("deepspeed", str(path), GIVEN)
    path.write_text(json.dumps(config | {"bf16": {"enabled": False}}))
    check_engine_file("deepspeed", str(path), GIVEN | {"bf16": False})


@pytest.mark.parametrize("file", sorted((ROOT / "scripts/parallel").glob("*.json")), ids=lambda path: path.name)
def test_the_shipped_engine_files_are_accepted(file):
    for bf16 in (True, False):
        check_engine_file("fsdp_config" if "fsdp" in file.name else "deepspeed", str(file), GIVEN | {"bf16": bf16})


def test_a_plan_knows_the_engine_that_it_does_not_start(qwen3, data, tmp_path, capsys):
    """The launch script plans first: a flag of an engine must not be refused there, nor let through without one."""
    flags = train_flags(qwen3, data / "hard.jsonl", tmp_path / "out", tmp_path / "cache", sync_each_chunk="yes")
    one = tmp_path / "zero1.json"
    one.write_text((ROOT / "scripts/parallel/zero2.json").read_text().replace('"stage": 2', '"stage": 1'))
    found = {}
    for name, engine in {
        "ddp": [],
        "fsdp2": ["--fsdp", "full_shard"],
        "zero1": ["--deepspeed", str(one)],
        "zero2": ["--deepspeed", str(ROOT / "scripts/parallel/zero2.json")],
    }.items():
        found[name] = run_verb(plan.main, [*flags, *engine, "--ranks", "2"])
        assert ("does not shard the gradient" in capsys.readouterr().err) == (found[name] == 2)
    assert found == {"ddp": 2, "fsdp2": 0, "zero1": 2, "zero2": 0}
