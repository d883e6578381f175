"""Refuse an engine's file (--deepspeed, --fsdp_config) that contradicts the flags, or asks for what no test covers."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from gritlm.errors import UserError
from gritlm.strict_json import read_json_object

INSTEAD = """put in "torch_autocast": {"enabled": "auto", "dtype": "bfloat16", "lower_precision_safe_modules": []}, \
and "communication_data_type": "fp32"; --bf16 switches it on"""
LEFT_OUT = "it left out"


def _is_off(value: Any) -> bool:
    return not value or value == {"enabled": False}


def _left_to(flag: str) -> str:
    return f"auto; --{flag} decides"


# (key, whether its value is right under these flags (None: the key is absent), what is wanted)
Check = tuple[str, Callable[[Any, SimpleNamespace], bool], str]
DEEPSPEED: tuple[Check, ...] = (
    ("zero_optimization.stage", lambda value, f: value in (1, 2, 3), "1, 2 or 3"),
    (
        "bf16.enabled",
        lambda value, f: value is None or (value is False and not f.bf16),
        f"{LEFT_OUT}, since it adds the gradients of all chunks up in bfloat16; {INSTEAD}",
    ),
    ("fp16.enabled", lambda value, f: value in (None, False), f"{LEFT_OUT}; {INSTEAD}"),
    ("torch_autocast.enabled", lambda value, f: value in (None, "auto", f.bf16), _left_to("bf16")),
    ("torch_autocast.dtype", lambda value, f: value in (None, "bfloat16", "bf16", "torch.bfloat16"), "bfloat16"),
    (
        "torch_autocast.lower_precision_safe_modules",
        lambda value, f: value in (None, []),
        "[], since the gradients of the others would be reduced in bfloat16",
    ),
    ("communication_data_type", lambda value, f: value in (None, "fp32"), "fp32"),
    ("data_types.grad_accum_dtype", lambda value, f: value in (None, "fp32"), "fp32"),
    *(
        (f"zero_optimization.{key}", lambda value, f: _is_off(value), LEFT_OUT)
        for key in (
            *("offload_optimizer", "offload_param", "zenflow"),
            *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
        )
    ),
    ("gradient_accumulation_steps", lambda value, f: value in (None, 1, "auto"), "1"),
    (
        "gradient_clipping",
        lambda value, f: value in ("auto", f.max_grad_norm),
        f"{_left_to('max_grad_norm')} (DeepSpeed's own default is 1.0)",
    ),
    ("train_micro_batch_size_per_gpu", lambda value, f: value == "auto", _left_to("global_batch_size")),
    ("train_batch_size", lambda value, f: value in (None, "auto"), _left_to("global_batch_size")),
    ("optimizer", lambda value, f: value is None, f"{LEFT_OUT}; --optim and --learning_rate decide"),
    ("scheduler", lambda value, f: value is None, f"{LEFT_OUT}; --lr_scheduler_type decides"),
)
# Further sections of DeepSpeed's file that change no number: how it reports, saves, and treats other optimizers.
HARMLESS = frozenset(
    (
        *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger"),
        *("flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "checkpoint", "aio"),
        *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    )
)
FSDP: tuple[Check, ...] = (
    *((key, lambda value, f: value is None or str(value) == "2", "2") for key in ("version", "fsdp_version")),
    *(
        (key, lambda value, f: str(value).lower() in ("none", "false"), LEFT_OUT)
        for key in ("cpu_offload", "offload_params", "fsdp_offload_params", "xla")
    ),
    (
        "activation_checkpointing",
        lambda value, f: str(value).lower() in ("none", "false"),
        f"{LEFT_OUT}; --gradient_checkpointing does it",
    ),
)


def check_engine_file(name: str, path: str | None, flags: dict[str, Any]) -> None:
    """Check the file that the flag `name` gives, deepspeed or fsdp_config, against the other flags.

    Raises:
        UserError: it is missing, no JSON, or a setting in it is not supported.
    """
    if not path:
        return
    file = f"--{name} {path}"
    config = read_json_object(path, f"--{name}")
    checks = DEEPSPEED if name == "deepspeed" else FSDP
    for key, is_right, wanted in checks:
        section, _, inner = key.rpartition(".")
        part = config.get(section, {}) if section else config
        if not isinstance(part, dict):
            raise UserError(f"{file}: {section}: found {type(part).__name__}, wanted a JSON object")
        if not is_right(part.get(inner), SimpleNamespace(**flags)):
            found = json.dumps(part[inner]) if inner in part else "nothing"
            raise UserError(f"{file}: {key}: found {found}, wanted {wanted}")
    known = {key.split(".")[0] for key, _, _ in checks} | HARMLESS
    for key in config if name == "deepspeed" else ():
        if key not in known and not _is_off(config[key]):
            raise UserError(f"{file}: {key}: found a setting that no test covers, wanted {LEFT_OUT}")


def engine_asked_for(flags: dict[str, Any]) -> str:
    """ddp, fsdp2, zero1, zero2 or zero3, by flags that were checked. `plan` starts none."""
    if path := flags.get("deepspeed"):
        return f"zero{read_json_object(path, '--deepspeed')['zero_optimization']['stage']}"
    return "fsdp2" if flags.get("fsdp") else "ddp"
