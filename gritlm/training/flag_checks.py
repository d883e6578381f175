"""Refuse flags that are missing, wrong, or contradict one another, before data or weights are read."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from gritlm.errors import UserError
from gritlm.models.base import BaseSettings, read_base
from gritlm.models.pooling import POOLING
from gritlm.training.arguments import EXAMPLES, GROUPS, ModelArguments, RunArguments, make_parser
from gritlm.training.setup import settle

REQUIRED = ("model_name_or_path", "train_data", "output_dir")
ABOVE_ZERO = (
    "train_group_size",
    "query_max_len",
    "passage_max_len",
    "global_batch_size",
    "temperature",
    "sampling_temperature",
    "chunk_tokens",
)
DEFAULT_PER_DEVICE: int = TrainingArguments.per_device_train_batch_size
NOT_NEGATIVE = ("max_example_num_per_dataset", "projection", "hang_timeout", "seed")

# Hugging Face's flags that have no place here, and why. Their other flags work as documented there.
UNSUPPORTED = {
    "fp16": "use --bf16 (same speed, no loss scaling)",
    "tf32": "the loss is exact in float32; --bf16 is faster",
    "auto_find_batch_size": "the batch is part of the loss; lower --chunk_tokens",
    "save_only_model": "such a run could not be resumed",
    "ignore_data_skip": "a resumed run would repeat data",
    "save_on_each_node": "--output_dir must be a folder that all nodes share",
    "data_seed": "--seed also sets the order of the rows",
    "dataloader_drop_last": "every batch is full; rows left over come in another epoch",
    "label_smoothing_factor": "it belongs to another loss",
    "neftune_noise_alpha": "both passes would need the same noise",
    "torch_empty_cache_steps": "lower --chunk_tokens or --activation_memory",
    "push_to_hub": "upload the folder when it is done (hf upload)",
    "accelerator_config": "batches reach the ranks without accelerate",
    "use_liger_kernel": "it knows no model of this kind; see --torch_compile",
    "enable_jit_checkpoint": "a run saves on SIGTERM anyway",
    **dict.fromkeys(
        ("train_sampling_strategy", "dataloader_in_order"),
        "which rows form a batch follows from the seed, the epoch and the step alone",
    ),
    **dict.fromkeys(
        ("eval_strategy", "do_eval", "do_predict", "eval_on_start", "bf16_full_eval", "fp16_full_eval"),
        "a run evaluates nothing; each checkpoint is a model folder to evaluate",
    ),
}

# (what is wrong with these flags, message). `ranks` is the number of processes; `training` has HF's properties.
RULES: tuple[tuple[Callable[[SimpleNamespace], bool], str], ...] = (
    (
        lambda f: not Path(f.train_data).exists(),
        "--train_data {train_data}: no such file or folder",
    ),
    (
        lambda f: f.chunk_tokens < max(f.query_max_len, f.passage_max_len),
        "--chunk_tokens {chunk_tokens} holds not even one text of {longest} tokens; see --query_max_len and "
        "--passage_max_len, by default those of an embedding model as base",
    ),
    (
        lambda f: f.attn == "cc" and f.pooling_method == "cls",
        "--attn cc with --pooling_method cls: the first token sees no other, every text gets one vector",
    ),
    (
        lambda f: f.emb_q_only and f.emb_p_only,
        "--emb_q_only and --emb_p_only: choose one; together no weight would get a gradient",
    ),
    (
        lambda f: f.gradient_accumulation_steps != 1,
        "--gradient_accumulation_steps: wanted 1. In-batch negatives make the sum of small batches another loss; "
        "memory is bounded by --chunk_tokens instead, with the exact gradient of the whole batch",
    ),
    (
        lambda f: not _is_auto_or_gb(f.activation_memory),
        "--activation_memory: found {activation_memory!r}, wanted auto, or GB from 0 up",
    ),
    (
        lambda f: f.negatives_ring and not f.negatives_cross_device,
        "--negatives_ring sends other ranks' passages round, --negatives_cross_device False wants none",
    ),
    (
        lambda f: f.torch_compile and bool(f.deepspeed),
        "--torch_compile with --deepspeed: not supported; with --fsdp it is",
    ),
    (lambda f: bool(f.deepspeed and f.fsdp), "--deepspeed and --fsdp: choose one"),
    (lambda f: bool(f.fsdp_config and not f.fsdp), "--fsdp_config without --fsdp has no effect"),
    (
        lambda f: bool(f.bf16 and f.deepspeed) and zero_stage(f.training) == 1,
        "--bf16 with ZeRO-1: DeepSpeed's optimizer there reduces at every chunk; use zero2.json",
    ),
    (
        lambda f: f.global_batch_size % f.ranks > 0,
        "--global_batch_size {global_batch_size} is not a multiple of the {ranks} ranks",
    ),
    (
        lambda f: f.per_device_train_batch_size not in (DEFAULT_PER_DEVICE, f.global_batch_size // f.ranks),
        "--per_device_train_batch_size {per_device_train_batch_size} contradicts --global_batch_size "
        "{global_batch_size} on {ranks} ranks; leave it out",
    ),
)

# Rules of the machine that runs, left out where a run is only planned.
MACHINE_RULES: tuple[tuple[Callable[[SimpleNamespace], bool], str], ...] = (
    (
        lambda f: f.training.n_gpu > 1 and f.ranks == 1,
        "found {gpus} GPUs and one process, wanted torchrun --nproc-per-node {gpus} -m gritlm train ... (as the "
        "scripts start it), or CUDA_VISIBLE_DEVICES with one",
    ),
    (
        # accelerate would silently train without them: on one rank, or with plain DDP.
        lambda f: bool(f.deepspeed or f.fsdp) and f.training.distributed_state.distributed_type in ("NO", "MULTI_CPU"),
        "{engine}: found no GPUs under torchrun, wanted at least one (on a CPU, use plain DDP)",
    ),
)


def zero_stage(training: TrainingArguments) -> int:
    return training.hf_deepspeed_config.config["zero_optimization"]["stage"]


def _is_auto_or_gb(text: str) -> bool:
    try:
        return text == "auto" or float(text) >= 0
    except ValueError:
        return False


def parse(argv: list[str]) -> RunArguments:
    """The flags of `gritlm train`, checked.

    Raises:
        UserError: for a flag that is unknown, wrong, missing, or contradicts another.
    """
    flags = vars(make_parser("train", GROUPS, EXAMPLES).parse_args(argv))
    run, _ = build(flags)
    check(run, run.training.world_size)
    return run


def build(flags: dict[str, Any], *more: type, replaced: dict[str, Any] | None = None) -> tuple[RunArguments, Any]:
    """The groups from flags by name, and one group more. `replaced` flags are checked, then replaced.

    Flags that were not given and that the base decides get their values here.

    Raises:
        UserError: what a group's __post_init__ raises; the base's own settings are damaged, or cannot be taken up.
    """
    for name in ("deepspeed", "fsdp_config"):
        check_json(name, flags[name])
    try:
        groups = make_parser("train", (*GROUPS, *more), EXAMPLES).parse_dict(flags | (replaced or {}))
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error).strip().splitlines()[0]) from error
    model, data, objective, training = groups[:4]
    base = read_base(model.model_name_or_path)
    check_base_settings(model, base)
    run = RunArguments(settle(model, base), settle(data, base), objective, training, base)
    return run, groups[4] if more else None


def check_base_settings(model: ModelArguments, base: BaseSettings) -> None:
    """Refuse a base with a pooling or a projection that the run cannot take up, unless a flag decides otherwise."""
    name, pooling, projection = f"--model_name_or_path {model.model_name_or_path}", "pooling_method", "projection"
    if pooling in base.unusable and model.pooling_method is None:
        raise UserError(
            f"{name}: found {base.unusable[pooling]} pooling, wanted {', '.join(POOLING)}; --{pooling} names another"
        )
    if model.projection == 0 or model.reset_weight:
        return
    if projection in base.unusable:
        raise UserError(
            f"{name}: found {base.unusable[projection]}, wanted one linear layer after pooling; "
            f"--{projection} 0 drops it"
        )
    if base.projection and model.projection not in (None, base.projection):
        raise UserError(
            f"{name}: found a projection of width {base.projection}, wanted --{projection} {model.projection}; "
            f"--{projection} {base.projection} takes it up, --{projection} 0 drops it"
        )


def check(run: RunArguments, ranks: int, here: bool = True) -> None:
    """Refuse flags that cannot work on this many ranks.

    Args:
        ranks: processes that the run has, or will have.
        here: False where a run is only planned, on a machine that need not be the one that runs it.
    """
    flags = run.flags()
    for name in REQUIRED:
        if not flags[name]:
            raise UserError(f"--{name} is missing")
    for name in ABOVE_ZERO:
        if flags[name] <= 0:
            raise UserError(f"--{name}: found {flags[name]}, wanted a number above 0")
    for name in NOT_NEGATIVE:
        if (flags[name] or 0) < 0:
            raise UserError(f"--{name}: found {flags[name]}, wanted 0 or more")
    training = run.training
    defaults = {f.name: f.default for f in dataclasses.fields(training)} | {"accelerator_config": AcceleratorConfig()}
    for name, why in UNSUPPORTED.items():
        if name in flags and flags[name] != defaults[name]:  # older versions of transformers lack some
            raise UserError(f"--{name}: not supported, {why}")
    facts = SimpleNamespace(**flags, ranks=ranks, training=training)
    for is_wrong, message in (*RULES, *(MACHINE_RULES if here else ())):
        if is_wrong(facts):
            engine = "--deepspeed" if training.deepspeed else "--fsdp"
            longest = max(run.data.query_max_len, run.data.passage_max_len)
            known = vars(facts) | {"engine": engine, "gpus": training.n_gpu, "longest": longest}
            raise UserError(message.format_map(known))


def check_json(name: str, path: str | None) -> None:
    """Refuse an engine's file that is missing, is no JSON, or asks for what no test covers."""
    if not path:
        return
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--{name} {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--{name} {path}: no JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--{name} {path}: found {type(config).__name__}, wanted a JSON object")
    zero, fp16 = config.get("zero_optimization", {}), config.get("fp16", {})
    for part, found in (("zero_optimization", zero), ("fp16", fp16)):
        if not isinstance(found, dict):
            raise UserError(f"--{name} {path}: {part}: found {type(found).__name__}, wanted a JSON object")
    refused = {
        "deepspeed": {
            "zero_optimization.stage": zero.get("stage") not in (1, 2, 3),
            "zero_optimization.offload_optimizer": bool(zero.get("offload_optimizer")),
            "zero_optimization.offload_param": bool(zero.get("offload_param")),
            "gradient_accumulation_steps": config.get("gradient_accumulation_steps", 1) not in (1, "auto"),
            "fp16.enabled": fp16.get("enabled", False) is True,
            "gradient_clipping (wanted: auto; DeepSpeed's own default is 1.0)": "gradient_clipping" not in config,
        },
        "fsdp_config": {
            "version": str(config.get("version", config.get("fsdp_version", 2))) != "2",
            "cpu_offload": bool(config.get("cpu_offload", config.get("fsdp_offload_params"))),
            "activation_checkpointing (use --gradient_checkpointing)": bool(config.get("activation_checkpointing")),
            "xla": bool(config.get("xla")),
        },
    }[name]
    for key, wrong in refused.items():
        if wrong:
            raise UserError(f"--{name} {path}: {key} is missing, or set to something that is not supported")
