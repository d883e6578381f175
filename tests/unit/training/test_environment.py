"""A variable of the environment that would change the maths is refused, unless a flag says the same."""

import os

import pytest

from gritlm.errors import UserError
from gritlm.training.environment import (
    CHANGES_THE_MATHS,
    abandoned_builds,
    recorded_environment,
    refuse_environment,
)

FLAGS = {
    "bf16": False,
    "torch_compile": False,
    "max_grad_norm": 1.0,
    "use_cpu": False,
    "fsdp": False,
    "deepspeed": None,
}
# variable, value, flags that say the same (None: there are none)
REFUSED = (
    ("ACCELERATE_MIXED_PRECISION", "bf16", {"bf16": True}),
    ("ACCELERATE_MIXED_PRECISION", "fp16", None),
    ("ACCELERATE_MIXED_PRECISION", "fp8", None),
    ("ACCELERATE_DOWNCAST_BF16", "1", None),
    ("ACCELERATE_FP8_BACKEND", "TE", None),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", {"torch_compile": True, "torch_compile_backend": "inductor"}),
    ("ACCELERATE_DYNAMO_MODE", "max-autotune", {"torch_compile_mode": "max-autotune"}),
    ("ACCELERATE_DYNAMO_USE_DYNAMIC", "True", None),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", None),
    ("ACCELERATE_GRADIENT_CLIPPING", "0.5", {"max_grad_norm": 0.5}),
    ("ACCELERATE_USE_CPU", "true", {"use_cpu": True}),
    ("ACCELERATE_TORCH_DEVICE", "cpu", {"use_cpu": True}),
    ("ACCELERATE_TORCH_DEVICE", "cuda:1", None),
    ("ACCELERATE_USE_FSDP", "true", {"fsdp": "full_shard"}),
    ("ACCELERATE_USE_DEEPSPEED", "true", {"deepspeed": "zero2.json"}),
    ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", {"deepspeed": "zero3.json"}),
    ("ACCELERATE_USE_MEGATRON_LM", "true", None),
    ("PARALLELISM_CONFIG_TP_SIZE", "2", None),
    ("FSDP_VERSION", "1", None),
    ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP", {"fsdp": True}),
    ("FSDP_OFFLOAD_PARAMS", "true", None),
    ("FSDP_IGNORED_MODULES", "norm", None),
    ("NVIDIA_TF32_OVERRIDE", "1", None),
    ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1", None),
    ("CUBLAS_EMULATE_SINGLE_PRECISION", "1", None),
    ("HIPBLASLT_ALLOW_TF32", "1", None),
    ("XLA_USE_BF16", "1", None),
    ("PYTORCH_MPS_FAST_MATH", "1", None),
    ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", None),
    ("TORCHINDUCTOR_USE_FAST_MATH", "1", None),
)
# What the launch script and accelerate's launcher set, or what changes no number.
ALLOWED = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_USE_FSDP": "false",
    "NVIDIA_TF32_OVERRIDE": "0",
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "THP_MEM_ALLOC_ENABLE": "1",
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    "TORCH_COMPILE_DISABLE": "1",  # nothing is compiled
    "CUDA_VISIBLE_DEVICES": "1",
}


@pytest.mark.parametrize(("name", "value", "same"), REFUSED)
def test_refused_unless_a_flag_says_the_same(monkeypatch, name, value, same):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^environment: {name}={value} .*unset it"):
        refuse_environment(FLAGS)
    if same is not None:
        refuse_environment(FLAGS | same)


def test_what_changes_no_number_is_allowed(monkeypatch):
    for name, value in ALLOWED.items():
        monkeypatch.setenv(name, value)
    refuse_environment(FLAGS)
    with pytest.raises(UserError, match="TORCH_COMPILE_DISABLE=1 keeps --torch_compile from compiling"):
        refuse_environment(FLAGS | {"torch_compile": True})


def test_the_first_row_that_matches_decides():
    patterns = [pattern for pattern, *_ in CHANGES_THE_MATHS]
    assert len(patterns) == len(set(patterns))
    assert patterns.index("ACCELERATE_DYNAMO_BACKEND") < patterns.index("ACCELERATE_DYNAMO_*")


def test_secrets_are_not_recorded(monkeypatch):
    for name, value in {"HF_TOKEN": "hf_x", "WANDB_API_KEY": "y", "HF_HOME": "/models", "NCCL_DEBUG": "INFO"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EDITOR", "vi")
    found = recorded_environment()
    assert (found["HF_TOKEN"], found["WANDB_API_KEY"]) == ("set", "set")
    assert (found["HF_HOME"], found["NCCL_DEBUG"]) == ("/models", "INFO")
    assert "EDITOR" not in found


def test_the_lock_of_a_build_that_was_killed_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert abandoned_builds() == []
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert abandoned_builds() == [], "control: a build that may be running"
    os.utime(lock, (0, lock.stat().st_mtime - 3600))
    (warning,) = abandoned_builds()
    assert f"found {lock}, 60 minutes old" in warning
