"""What flags may hold: ranges, and rules between them. flag_checks.py applies the rules."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainingArguments

from gritlm.errors import UserError
from gritlm.models.hub import base_of
from gritlm.report.servers import PORTABLE_POOLING
from gritlm.training.arguments import DataArguments, TuningArguments

DEFAULT_PER_DEVICE: int = TrainingArguments.per_device_train_batch_size
SHARE = "a whole number of steps, or below 1 a share of all steps"

# (what is wanted, whether a number is that, the flags). A comparison with nan is False.
RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "a number above 0",
        lambda x: 0 < x < math.inf,
        (
            *("train_group_size", "query_max_len", "passage_max_len", "global_batch_size", "chunk_tokens"),
            *("max_positives", "cosent_temperature", "teacher_temperature", "student_temperature", "margin_mse_scale"),
            *("temperature", "sampling_temperature", "num_train_epochs", "adam_epsilon"),
            *("dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout", "ranks", "early_stopping_patience"),
            *("lora_r", "lora_alpha", "projection_learning_rate"),
        ),
    ),
    (
        "0 or more",
        lambda x: 0 <= x < math.inf,
        (
            *("max_example_num_per_dataset", "projection", "hang_timeout", "learning_rate", "weight_decay"),
            *("max_grad_norm", "save_total_limit", "merge_last", "dataloader_num_workers", "batches"),
            *("eval_held_out", "eval_delay", "early_stopping_threshold", "focal_gamma", "spread_out_weight"),
            *("contrastive_weight", "cosent_weight", "angle_weight", "distill_weight", "margin_mse_weight"),
            *("teacher_weight", "guide_margin"),
            *("hardness_hard", "hardness_in_batch", "false_negative_margin", "false_negative_relative_margin"),
        ),
    ),
    ("a number from 0 to below 1", lambda x: 0 <= x < 1, ("adam_beta1", "adam_beta2", "sigreg_weight", "lora_dropout")),
    ("a number above 0 and below 1", lambda x: 0 < x < 1, ("tau_plus", "ema_decay")),
    ("0 to 4294967295", lambda x: 0 <= x < 2**32, ("seed",)),
    ("a number above 0, or -1: --num_train_epochs decides", lambda x: x == -1 or x > 0, ("max_steps",)),
    (
        f"{SHARE}, above 0",
        lambda x: 0 < x < math.inf and (x < 1 or x % 1 == 0),
        ("save_steps", "logging_steps", "eval_steps"),
    ),
    (SHARE, lambda x: 0 <= x < math.inf and (x < 1 or x % 1 == 0), ("warmup_steps",)),
)

OF_LORA = [*(name for name in vars(TuningArguments) if name.startswith("lora_")), "continue_adapter", "keep_adapter"]
OF_AN_ADAPTER = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
CLUSTER_SIZE = DataArguments.cluster_size

# Flags that hold a JSON object, with an example.
OBJECTS = {
    "lr_scheduler_kwargs": '{"num_cycles": 2}',
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
    "activation_checkpointing_kwargs": '{"use_reentrant": false}',
}

# (what is wrong with these flags, message). `ranks` is the number of processes; `training` has HF's properties;
# `engine_asked_for` is the engine of the run, also where it is only planned.
RULES: tuple[tuple[Callable[[SimpleNamespace], bool], str], ...] = (
    (
        lambda f: not Path(f.train_data).exists(),
        "--train_data {train_data}: no such file or folder",
    ),
    (
        # The next start would read the run's own files as data.
        lambda f: _is_within(f.output_dir, f.train_data),
        "--output_dir {output_dir}: found a folder in --train_data {train_data}, wanted one outside of it",
    ),
    (
        lambda f: any(not Path(path).exists() for path in f.eval_data or ()),
        "--eval_data: found no such file or folder among {eval_data}",
    ),
    (
        lambda f: bool(f.data_cache) and _is_within(f.data_cache, f.output_dir),
        "--data_cache {data_cache}: found a folder in --output_dir {output_dir}, wanted one outside of it",
    ),
    (lambda f: f.cluster_size < 2, "--cluster_size {cluster_size}: wanted 2 or more"),
    (
        lambda f: f.cluster_size != CLUSTER_SIZE and not f.mined_batches,
        "--cluster_size {cluster_size} without --mined_batches has no effect",
    ),
    (
        lambda f: f.chunk_tokens < max(f.query_max_len, f.passage_max_len),
        "--chunk_tokens {chunk_tokens} holds not even one text of {longest} tokens; raise it, or lower "
        "--query_max_len and --passage_max_len (an embedding model sets their defaults)",
    ),
    (
        lambda f: f.attn == "cc" and f.pooling_method == "cls",
        "--attn cc with --pooling_method cls: the first token sees no other token, and it alone makes the vector",
    ),
    (
        lambda f: f.contract == "portable" and not (f.pool_instruction and f.append_eos),
        "--contract portable: found --pool_instruction {pool_instruction} and --append_eos {append_eos}, wanted both "
        "True (vLLM, TEI and llama.cpp pool the instruction); leave them out",
    ),
    (
        lambda f: f.contract == "portable" and f.pooling_method not in PORTABLE_POOLING,
        "--contract portable: found --pooling_method {pooling_method}, wanted one that every server has: "
        + ", ".join(PORTABLE_POOLING),
    ),
    (
        lambda f: f.contract == "paper" and (f.pooling_method != "mean" or f.pool_instruction or f.append_eos),
        "--contract paper: found --pooling_method {pooling_method}, --pool_instruction {pool_instruction} and "
        "--append_eos {append_eos}, wanted mean, False and False; leave --contract out to choose each",
    ),
    (
        lambda f: f.selective_checkpointing and f.gradient_checkpointing,
        "--selective_checkpointing and --gradient_checkpointing: choose one; the latter keeps less and recomputes all",
    ),
    (
        lambda f: f.selective_checkpointing and f.torch_compile,
        "--selective_checkpointing with --torch_compile: not supported, no layer would be compiled; leave one out",
    ),
    (lambda f: f.lora and f.qlora, "--lora and --qlora: choose one; --qlora is LoRA on 4-bit weights"),
    (
        lambda f: not (f.lora or f.qlora) and bool(changed(f, OF_LORA)),
        "{lora_flags}: has no effect without --lora or --qlora",
    ),
    (
        lambda f: f.continue_adapter and bool(changed(f, OF_AN_ADAPTER)),
        "--continue_adapter: found {adapter_flags}, wanted none: the adapter goes on with its own settings",
    ),
    (
        lambda f: f.continue_adapter and base_of(f.model_name_or_path) == f.model_name_or_path,
        "--continue_adapter: found no adapter in --model_name_or_path {model_name_or_path}; leave it out to start one",
    ),
    (
        lambda f: (f.lora or f.qlora) and f.reset_weight,
        "--reset_weight with {lora}: an adapter on random weights that stay random; choose one",
    ),
    (
        lambda f: (f.lora or f.qlora) and find_spec("peft") is None,
        "{lora}: peft is not installed; pip install peft",
    ),
    (
        lambda f: f.qlora and (f.ranks > 1 or bool(f.deepspeed or f.fsdp)),
        "--qlora: found {ranks_or_engine}, wanted one process; --lora trains on any number, and shards the weights",
    ),
    (
        lambda f: f.qlora and find_spec("bitsandbytes") is None,
        "--qlora: bitsandbytes is not installed; pip install bitsandbytes, or use --lora",
    ),
    (
        lambda f: not _is_auto_or_gb(f.activation_memory),
        "--activation_memory: found {activation_memory!r}, wanted auto, or GB from 0 up",
    ),
    (
        lambda f: f.sync_each_chunk == "yes" and f.engine_asked_for in ("ddp", "zero1"),
        "--sync_each_chunk yes: found an engine that does not shard the gradient, wanted --fsdp, or --deepspeed with "
        "stage 2 or 3",
    ),
    (
        lambda f: (f.lora or f.qlora) and (f.bf16_weights or f.ema_decay is not None),
        "{lora}: found --bf16_weights or --ema_decay, which are of a whole model; leave them out",
    ),
    (
        lambda f: f.muon_iteration != "float32" and not f.use_muon,
        "--muon_iteration {muon_iteration} without --use_muon has no effect",
    ),
    (
        lambda f: f.bf16_weights and not f.bf16,
        "--bf16_weights without --bf16: wanted --bf16 True, since the products of bfloat16 weights are bfloat16",
    ),
    (
        lambda f: f.merge_last == 1 or (f.merge_last > 0 and f.save_strategy == "no"),
        "--merge_last {merge_last}: wanted 2 saves or more to merge, and a --save_strategy other than no",
    ),
    (
        lambda f: f.merge_last > 0 and (f.lora or f.qlora),
        "--merge_last {merge_last}: found --lora, whose checkpoints are adapters; merge the folders that runs publish",
    ),
    (
        lambda f: f.torch_compile and bool(f.deepspeed),
        "--torch_compile with --deepspeed: not supported; with --fsdp it is",
    ),
    (lambda f: bool(f.deepspeed and f.fsdp), "--deepspeed and --fsdp: choose one"),
    (lambda f: bool(f.fsdp_config and not f.fsdp), "--fsdp_config without --fsdp has no effect"),
    (
        lambda f: f.global_batch_size % f.ranks > 0,
        "--global_batch_size {global_batch_size} is not a multiple of the {ranks} ranks",
    ),
    (
        lambda f: f.per_device_train_batch_size not in (DEFAULT_PER_DEVICE, f.global_batch_size // f.ranks),
        "--per_device_train_batch_size {per_device_train_batch_size} contradicts --global_batch_size "
        "{global_batch_size} on {ranks} ranks; leave it out, and give --global_batch_size the queries of a step",
    ),
)

# Rules of the machine that runs, left out where a run is only planned.
MACHINE_RULES: tuple[tuple[Callable[[SimpleNamespace], bool], str], ...] = (
    (
        # Each would train alone.
        lambda f: os.environ.get("WORLD_SIZE", "1") != str(f.ranks),
        "found no GPU for torchrun's processes, wanted --use_cpu True",
    ),
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


def check_ranges(flags: Mapping[str, Any]) -> None:
    for wanted, is_right, names in RANGES:
        for name in names:
            if flags.get(name) is not None and not is_right(flags[name]):
                raise UserError(f"--{name}: found {flags[name]}, wanted {wanted}")


def _is_within(inner: str, outer: str) -> bool:
    return Path(inner).resolve().is_relative_to(Path(outer).resolve())


def changed(flags: SimpleNamespace, names: Sequence[str]) -> str:
    """The flags of LoRA that do not have their default."""
    changed = [name for name in names if getattr(flags, name) != getattr(TuningArguments, name)]
    return ", ".join(f"--{name}" for name in changed)


def _is_auto_or_gb(text: str) -> bool:
    try:
        return text == "auto" or 0 <= float(text) < math.inf
    except ValueError:
        return False
