"""The environment: variables that run.json records or that are refused, and builds that were killed.

accelerate, torch and the libraries under it read the environment when they start. A variable that another job left
there would change the run, and neither the flags nor run.json would tell.
"""

import os
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gritlm.errors import UserError

RECORDED = (
    *("ACCELERATE_", "FSDP_", "TORCH_", "PYTORCH_", "CUDA_", "CUBLAS_", "NVIDIA_", "NCCL_", "DS_", "DEEPSPEED_"),
    *("HF_", "TRANSFORMERS_", "WANDB_", "OMP_", "MKL_"),
)
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
A_BUILD = 600.0  # seconds; no build takes longer
OFF = ("", "0", "no", "false", "off", "none", "default", "auto")

Flags = Mapping[str, Any]


def _is_off(value: str, flags: Flags) -> bool:
    return value in OFF


def _with(flag: str) -> Callable[[str, Flags], bool]:
    """The variable may be set where the flag is given."""
    return lambda value, flags: value in OFF or bool(flags.get(flag))


def _number(number: float | None, flag: str = "") -> Callable[[str, Flags], bool]:
    """The variable may be this number, or that of the flag."""

    def agrees(value: str, flags: Flags) -> bool:
        try:
            return value in OFF or float(value) == flags.get(flag, number)
        except ValueError:
            return False

    return agrees


def _precision(value: str, flags: Flags) -> bool:
    return value == "no" or (value == "bf16" and bool(flags.get("bf16")))


def _compiler(value: str, flags: Flags) -> bool:
    asked = (flags.get("torch_compile_backend") or "inductor") if flags.get("torch_compile") else ""
    return value in OFF or value == asked


# (name, what it does, whether a value in lower case agrees with the flags, the flag that does the same). "*" matches
# any letters. If several rows match a name, the first one applies.
CHANGES_THE_MATHS: tuple[tuple[str, str, Callable[[str, Flags], bool], str], ...] = (
    ("ACCELERATE_MIXED_PRECISION", "sets the precision", _precision, "--bf16"),
    ("ACCELERATE_DOWNCAST_BF16", "rounds to bfloat16", _is_off, "--bf16"),
    ("ACCELERATE_FP8_*", "sets the precision", _is_off, "--bf16"),
    ("ACCELERATE_DYNAMO_BACKEND", "compiles the model", _compiler, "--torch_compile"),
    ("ACCELERATE_DYNAMO_MODE", "compiles the model", _with("torch_compile_mode"), "--torch_compile_mode"),
    ("ACCELERATE_DYNAMO_*", "compiles the model in another way", _is_off, "--torch_compile"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "splits the batch", _number(1), "--chunk_tokens"),
    ("ACCELERATE_GRADIENT_CLIPPING", "clips the gradient", _number(None, "max_grad_norm"), "--max_grad_norm"),
    ("ACCELERATE_USE_CPU", "chooses the device", _with("use_cpu"), "--use_cpu"),
    (
        "ACCELERATE_TORCH_DEVICE",
        "chooses the device",
        lambda value, flags: value == "cpu" and bool(flags.get("use_cpu")),
        "--use_cpu or CUDA_VISIBLE_DEVICES",
    ),
    ("ACCELERATE_USE_FSDP", "chooses the engine", _with("fsdp"), "--fsdp"),
    ("ACCELERATE_USE_DEEPSPEED", "chooses the engine", _with("deepspeed"), "--deepspeed"),
    ("ACCELERATE_DEEPSPEED_*", "configures DeepSpeed", _with("deepspeed"), "--deepspeed"),
    ("ACCELERATE_USE_*", "chooses the engine", _is_off, "--fsdp or --deepspeed"),
    ("PARALLELISM_CONFIG_*", "shares the model out over the ranks", _number(1), "--fsdp or --deepspeed"),
    ("FSDP_VERSION", "chooses the engine", _number(2), "--fsdp"),
    *(
        (f"FSDP_{name}", "configures FSDP", _with("fsdp"), "--fsdp_config")
        for name in (
            *("STATE_DICT_TYPE", "AUTO_WRAP_POLICY", "RESHARD_AFTER_FORWARD", "CPU_RAM_EFFICIENT_LOADING"),
            *("USE_ORIG_PARAMS", "SYNC_MODULE_STATES", "FORWARD_PREFETCH", "BACKWARD_PREFETCH"),
        )
    ),
    ("FSDP_*", "configures FSDP", _is_off, "--fsdp_config"),
    *(
        (name, "rounds the products of float32 numbers", _is_off, "")
        for name in (
            *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "HIPBLASLT_ALLOW_TF32", "XLA_USE_BF16"),
            *("CUBLAS_EMULAT*", "XLA_DOWNCAST_BF16", "PYTORCH_MPS_FAST_MATH"),
        )
    ),
    *(
        (name, "rounds the products of float32 numbers", lambda value, flags: value in (*OFF, "strict"), "")
        for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
    ),
    *(
        (name, "makes compiled layers compute in another way", _is_off, "")
        for name in (
            *("TORCHINDUCTOR_USE_FAST_MATH", "TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG"),
            *("TORCHINDUCTOR_EMULATE_*", "TORCHINDUCTOR_FREEZING"),
        )
    ),
    *(
        (name, "keeps --torch_compile from compiling", lambda v, flags: v in OFF or not flags.get("torch_compile"), "")
        for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_OVERRIDE_BACKENDS")
    ),
)


def refuse_environment(flags: Flags) -> None:
    """Refuse variables that change the maths, unless a flag says the same.

    Call it before TrainingArguments are built: they set some of these variables themselves.

    Raises:
        UserError: naming the first one.
    """
    for name, value in sorted(os.environ.items()):
        for pattern, does, agrees, flag in CHANGES_THE_MATHS:
            if fnmatchcase(name, pattern):
                if not agrees(value.strip().lower(), flags):
                    instead = f" ({flag} is the flag for it)" if flag else ""
                    raise UserError(f"environment: {name}={value} {does}, and no flag says so; unset it{instead}")
                break


def recorded_environment() -> dict[str, str]:
    """The variables that run.json records. Of a secret it says only that it is set."""
    return {
        name: "set" if any(part in name for part in SECRET) else value
        for name, value in sorted(os.environ.items())
        if name.startswith(RECORDED)
    }


def abandoned_builds() -> list[str]:
    """Warnings on locks of torch's extensions, which DeepSpeed builds, that are older than `A_BUILD`.

    A start that was killed while it built an extension leaves its lock, and every later start waits for it.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    ages = {lock: time.time() - lock.stat().st_mtime for lock in root.glob("**/lock")}
    return [
        f"DeepSpeed: found {lock}, {age / 60:.0f} minutes old: every start waits for the build that holds it; if no "
        "process builds it any more, delete the file"
        for lock, age in ages.items()
        if age > A_BUILD
    ]
