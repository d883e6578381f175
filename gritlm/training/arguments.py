"""Every flag, once: its name, default, help and the checks that need nothing but the flags.

Defaults are the paper's recipe (arXiv 2601.21192, appendix A). Hugging Face's own `TrainingArguments` come on top.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from gritlm.errors import UserError


def flag(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """The network."""

    model_name_or_path: str | None = flag(None, "Qwen2 or Qwen3 model: a folder or a hub name. Required.")
    attn: Literal["bb", "cc"] = flag("bb", "Attention: bb bidirectional, cc causal.")
    attn_implementation: str = flag(
        "packed", "Attention kernel: packed (no padding), or padded: sdpa, eager, flash_attention_2."
    )
    pooling_method: Literal["mean", "weightedmean", "lasttoken", "cls"] = flag(
        "mean", "Token states to one vector: mean, weightedmean (by position), lasttoken, cls (first token)."
    )
    normalized: bool = flag(True, "Divide each vector by its norm, so that the similarity is the cosine.")
    projection: int | None = flag(None, "Width of a linear layer after pooling. None: no such layer.")
    reset_weight: bool = flag(False, "Start from the model's own random initialisation; read no weights.")
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model.")


@dataclass
class DataArguments:
    """The data and the text contract."""

    train_data: str | None = flag(
        None,
        "A .jsonl, .jsonl.gz or .parquet file, or a folder: each file, and each sub-folder, in it is one data set. "
        "Required.",
    )
    train_group_size: int = flag(4, "Passages per query: 1 positive and up to this many less one hard negatives.")
    query_max_len: int = flag(512, "Longest query in tokens, instruction included; the end is cut off.")
    passage_max_len: int = flag(512, "Longest passage in tokens; the end is cut off.")
    pool_instruction: bool = flag(False, "Let the instruction's tokens count in pooling.")
    append_eos: bool = flag(False, "End every text with the tokenizer's end-of-text token.")
    max_example_num_per_dataset: int | None = flag(None, "Use at most this many rows of each data set (seeded draw).")
    num_samples: str | None = flag(
        None, "JSON file of data set: rows that an epoch takes of it (repeated where it has fewer). Others: all."
    )
    sampling_temperature: float = flag(
        1.0, "Above 1: of each data set in proportion to its rows to the power 1 / this; an epoch is as long."
    )
    data_cache: str | None = flag(None, "Folder for the data's memory-mapped form. None: beside the datasets cache.")


@dataclass
class EmbeddingTrainingArguments(TrainingArguments):
    """The run. What is declared here is new or has another default than in Hugging Face's TrainingArguments."""

    global_batch_size: int = flag(2048, "Queries per step over all ranks. Each rank takes an equal slice.")
    temperature: float = flag(0.02, "Temperature t of the InfoNCE loss: similarities are divided by it.")
    negatives_cross_device: bool = flag(
        True,
        "Contrast with the passages of all ranks. False: of the own rank only, so the run depends on their number.",
    )
    negatives_ring: bool = flag(
        False,
        "Pass the other ranks' passage vectors around in a ring; none holds them all. Slower, the same numbers.",
    )
    chunk_tokens: int = flag(
        16384, "GradCache: tokens (padding included) encoded at once. Bounds memory; the gradient is the same for any."
    )
    activation_memory: str = flag(
        "auto",
        "GB of activations that pass 1 keeps for pass 2, which else makes them again. auto: what is free; 0: none.",
    )
    hang_timeout: float = flag(
        900.0,
        "Seconds without progress (a save is one piece) after which the run ends, naming the rank, step and batch. "
        "0: after torch's own 30 minutes.",
    )

    learning_rate: float = flag(2e-5, "Peak learning rate.")
    lr_scheduler_type: str = flag("cosine", "Learning-rate schedule.")
    warmup_steps: float = flag(0.03, "Warm-up: a number of steps, or below 1 a share of all steps.")
    weight_decay: float = flag(0.05, "Weight decay of AdamW.")
    num_train_epochs: float = flag(1.0, "Passes over the data. --max_steps overrides it.")
    save_steps: float = flag(0.1, "A checkpoint every so many steps, or below 1 every such share of all steps.")
    save_total_limit: int | None = flag(2, "How many checkpoints to keep; the oldest goes first.")
    logging_steps: float = flag(10, "A log line every so many steps, or below 1 every such share of all steps.")
    logging_nan_inf_filter: bool = flag(False, "Left off: a NaN must be seen.")
    log_on_each_node: bool = flag(False, "Left off: the first rank speaks for all.")
    dataloader_num_workers: int = flag(2, "Processes per rank that read and tokenise ahead.")
    remove_unused_columns: bool = flag(False, "Left off: batches are made by this project's collator.")
    tf32: bool | None = flag(False, "Left off: the loss and its gradient are exact in float32.")
    ddp_find_unused_parameters: bool | None = flag(False, "Left off: every parameter gets a gradient.")
    ddp_broadcast_buffers: bool | None = flag(False, "Left off: the model's buffers are constants.")


# Of Hugging Face's flags; others of theirs work as documented there.
UNSUPPORTED = {
    "fp16": "use --bf16 (same speed, no loss scaling)",
    "tf32": "the loss is exact in float32; --bf16 is faster",
    "auto_find_batch_size": "the batch is part of the loss; lower --chunk_tokens",
    "save_only_model": "a run could not go on where it was",
    "ignore_data_skip": "a run could not go on where it was",
    "save_on_each_node": "--output_dir must be a folder that all nodes share",
    "data_seed": "--seed is of the order of the rows, too",
    "dataloader_drop_last": "every batch is full, and what is left over waits for another epoch",
    "label_smoothing_factor": "it is of another loss",
    "neftune_noise_alpha": "the second pass would need the noise of the first",
    "torch_empty_cache_steps": "lower --chunk_tokens or --activation_memory",
    "push_to_hub": "upload the folder when it is done (hf upload)",
    "accelerator_config": "batches reach the ranks without accelerate",
    "use_liger_kernel": "it knows no model of this kind; see --torch_compile",
    "enable_jit_checkpoint": "a run saves on SIGTERM anyhow",
    **dict.fromkeys(
        ("train_sampling_strategy", "dataloader_in_order"),
        "which rows form a batch follows from the seed, the epoch and the step alone",
    ),
    **dict.fromkeys(
        ("eval_strategy", "do_eval", "do_predict", "eval_on_start", "bf16_full_eval", "fp16_full_eval"),
        "a run evaluates nothing; each checkpoint is a model folder to evaluate",
    ),
}

FlagGroups = tuple[ModelArguments, DataArguments, EmbeddingTrainingArguments]
GROUPS = (ModelArguments, DataArguments, EmbeddingTrainingArguments)

EXAMPLES = """examples:
  gritlm train --model_name_or_path Qwen/Qwen3-0.6B --train_data pairs.jsonl --output_dir out --global_batch_size 256
  torchrun --nproc_per_node 8 -m gritlm train --model_name_or_path Qwen/Qwen3-0.6B --train_data data/ \\
      --output_dir out --bf16 --gradient_checkpointing
  gritlm plan ... --ranks 8      check flags and data as for 8 ranks, print the plan, load no model"""


def make_parser(*more: type) -> HfArgumentParser:
    return HfArgumentParser(
        (*GROUPS, *more), prog="gritlm train", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parse(argv: list[str]) -> FlagGroups:
    """Flags to the three groups, checked.

    Raises:
        UserError: for a flag that is wrong, missing, or contradicts another. argparse itself exits with 2.
    """
    flags = vars(make_parser().parse_args(argv))
    groups = build(flags)
    check(*groups, groups[2].world_size)
    return groups


def build(flags: dict, *more: type, here: dict | None = None) -> tuple:
    """The groups from flags by name, those in `here` replaced once they are checked.

    A group is checked by its own __post_init__; what that raises is the user's to mend.
    """
    for name in ("deepspeed", "fsdp_config"):
        check_json(name, flags[name])
    try:
        return make_parser(*more).parse_dict(flags | (here or {}))
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error).strip().splitlines()[0]) from error


def check_json(name: str, path: str | None) -> None:
    """Refuse an engine's file that is missing, no JSON, or asks for what no test here has seen."""
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


def check(
    model: ModelArguments, data: DataArguments, training: EmbeddingTrainingArguments, ranks: int, real: bool = True
) -> None:
    """Refuse flags that cannot work on so many ranks, before anything is read or loaded.

    `real` is false where a run is only planned, on a machine that need not be the one to run it.
    """
    for name, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("train_data", data.train_data),
        ("output_dir", training.output_dir),
    ):
        if not value:
            raise UserError(f"--{name} is missing")
    for name, value in (
        ("train_group_size", data.train_group_size),
        ("query_max_len", data.query_max_len),
        ("passage_max_len", data.passage_max_len),
        ("global_batch_size", training.global_batch_size),
        ("temperature", training.temperature),
        ("sampling_temperature", data.sampling_temperature),
        ("chunk_tokens", training.chunk_tokens),
    ):
        if value <= 0:
            raise UserError(f"--{name}: found {value}, wanted a number above 0")
    for name, value in (
        ("max_example_num_per_dataset", data.max_example_num_per_dataset or 0),
        ("projection", model.projection or 0),
        ("hang_timeout", training.hang_timeout),
        ("seed", training.seed),
    ):
        if value < 0:
            raise UserError(f"--{name}: found {value}, wanted 0 or more")
    if not Path(data.train_data).exists():
        raise UserError(f"--train_data {data.train_data}: no such file or folder")
    longest = max(data.query_max_len, data.passage_max_len)
    if training.chunk_tokens < longest:
        raise UserError(f"--chunk_tokens {training.chunk_tokens} holds not even one text of {longest} tokens")
    if model.attn == "cc" and model.pooling_method == "cls":
        raise UserError(
            "--attn cc with --pooling_method cls: the first token sees no other, every text gets one vector"
        )
    check_training(training, ranks, real)


def check_training(training: EmbeddingTrainingArguments, ranks: int, real: bool) -> None:
    if training.gradient_accumulation_steps != 1:
        raise UserError(
            "--gradient_accumulation_steps: wanted 1. In-batch negatives make the sum of small batches another loss; "
            "memory is bounded by --chunk_tokens instead, with the exact gradient of the whole batch"
        )
    try:
        fits = training.activation_memory == "auto" or float(training.activation_memory) >= 0
    except ValueError:
        fits = False
    if not fits:
        raise UserError(f"--activation_memory: found {training.activation_memory!r}, wanted auto, or GB from 0 up")
    defaults = {f.name: f.default for f in dataclasses.fields(training)} | {"accelerator_config": AcceleratorConfig()}
    for name, why in UNSUPPORTED.items():
        if getattr(training, name) != defaults[name]:
            raise UserError(f"--{name}: not supported, {why}")
    if real and training.n_gpu > 1 and ranks == 1:
        raise UserError(
            f"found {training.n_gpu} GPUs and one process, wanted torchrun --nproc-per-node {training.n_gpu} -m "
            "gritlm.train ... (as the scripts start it), or CUDA_VISIBLE_DEVICES with one"
        )
    if training.negatives_ring and not training.negatives_cross_device:
        raise UserError(
            "--negatives_ring passes other ranks' passages around, --negatives_cross_device False wants none"
        )
    if training.torch_compile and training.deepspeed:
        raise UserError("--torch_compile with --deepspeed: not supported; with --fsdp it is")
    if training.deepspeed and training.fsdp:
        raise UserError("--deepspeed and --fsdp: choose one")
    if training.fsdp_config and not training.fsdp:
        raise UserError("--fsdp_config without --fsdp has no effect")
    sharded = "--deepspeed" if training.deepspeed else "--fsdp" if training.fsdp else ""
    # accelerate would silently train without them: on one rank, or with plain DDP.
    if real and sharded and training.distributed_state.distributed_type in ("NO", "MULTI_CPU"):
        raise UserError(f"{sharded}: found no GPUs under torchrun, wanted at least one (on a CPU, use plain DDP)")
    if training.bf16 and training.deepspeed and training.hf_deepspeed_config.config["zero_optimization"]["stage"] == 1:
        raise UserError("--bf16 with ZeRO-1: DeepSpeed's optimizer there reduces at every chunk; use zero2.json")
    if training.global_batch_size % ranks:
        raise UserError(f"--global_batch_size {training.global_batch_size} is not a multiple of the {ranks} ranks")
    per_rank = training.global_batch_size // ranks
    if training.per_device_train_batch_size not in (TrainingArguments.per_device_train_batch_size, per_rank):
        raise UserError(
            f"--per_device_train_batch_size {training.per_device_train_batch_size} contradicts --global_batch_size "
            f"{training.global_batch_size} on {ranks} ranks; leave it out"
        )


def flag_table() -> str:
    """The README's table of this project's own flags, in Markdown."""
    rows = ["| flag | default | what it does |", "|---|---|---|"]
    inherited = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    for group in GROUPS:
        for f in dataclasses.fields(group):
            # Left-off switches of Hugging Face's are not for users to turn.
            if f.name in inherited and (f.default == inherited[f.name] or f.metadata["help"].startswith("Left off")):
                continue
            rows.append(f"| `--{f.name}` | `{f.default}` | {f.metadata['help']} |")
    return "\n".join(rows)
