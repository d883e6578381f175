"""Hugging Face's own flags, once: used, refused, or without effect; and which of them a resumed run may change.

A flag that no table here names fails a test. `tests/unit/training/test_inherited_flags.py` tries each one.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from transformers import TrainingArguments

from gritlm.errors import UserError

TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")

# Used as Hugging Face documents them; a run and its continuation must agree on them.
FIXED = (
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "seed", "full_determinism"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    "include_num_input_tokens_seen",  # a count that starts in the middle of a run would be wrong
)

# The same; a continuation may change them.
FREE = (
    *("output_dir", "resume_from_checkpoint", "use_cpu", "fsdp", "fsdp_config", "deepspeed"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_level", "log_level_replica", "disable_tqdm"),
    *("report_to", "run_name", *TRACKIO),
    *("save_strategy", "save_steps", "save_total_limit", "skip_memory_metrics"),
    *("do_eval", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    "dataloader_multiprocessing_context",
    *("ddp_bucket_cap_mb", "ddp_backend", "ddp_timeout"),
)

# Accepted without effect, with the reason.
NO_EFFECT = {
    "per_device_train_batch_size": "--global_batch_size decides; a value that contradicts it is refused",
    "average_tokens_across_devices": "the loss is the mean over the queries of all ranks",
    "do_train": "gritlm train always trains",
    "local_rank": "torchrun's environment variable LOCAL_RANK decides",
    "use_cache": "an encoder keeps no keys and values",
    "dataloader_persistent_workers": "the workers live as long as the run",
}

ORDER = "which rows form a batch follows from the seed, the epoch and the step alone"
NO_PREDICTIONS = "an evaluation encodes texts and measures their vectors; see --eval_data"
UPLOAD = "upload the folder when it is done (hf upload)"

# Refused, with the reason.
REFUSED = {
    "gradient_accumulation_steps": "with in-batch negatives, several small batches have another loss than one large "
    "batch; lower --chunk_tokens to save memory, and the gradient stays exact",
    "fp16": "use --bf16 (same speed, no loss scaling)",
    "tf32": "the loss is exact in float32; --bf16 is faster",
    "auto_find_batch_size": "the batch is part of the loss; lower --chunk_tokens",
    "save_only_model": "such a run could not be resumed",
    "ignore_data_skip": "a resumed run would repeat data",
    "restore_callback_states_from_checkpoint": "a resumed run restores all that it needs",
    "save_on_each_node": "--output_dir must be a folder that all nodes share",
    "log_on_each_node": "the first rank logs for all",
    "logging_nan_inf_filter": "a NaN must be seen",
    "data_seed": "--seed also sets the order of the rows",
    "dataloader_drop_last": "every batch is full; rows left over come in another epoch",
    "label_smoothing_factor": "it belongs to another loss",
    "label_names": "the texts are the only inputs",
    "remove_unused_columns": "this project builds the batches",
    "neftune_noise_alpha": "both passes would need the same noise",
    "optim_target_modules": "GaLore and APOLLO are not supported; --optim adafactor needs little memory",
    "torch_empty_cache_steps": "lower --chunk_tokens or --activation_memory",
    "accelerator_config": "batches reach the ranks without accelerate",
    "parallelism_config": "use --fsdp or --deepspeed",
    "ddp_find_unused_parameters": "every parameter gets a gradient",
    "ddp_broadcast_buffers": "the model's buffers are constants",
    "ddp_static_graph": "ranks have different numbers of chunks",
    "enable_jit_checkpoint": "a run saves on SIGTERM anyway",
    "debug": "a loss or gradient that is not finite ends the run, and names its step and rows",
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "it knows no model of this kind; see --torch_compile"),
    **dict.fromkeys(("train_sampling_strategy", "length_column_name", "dataloader_in_order"), ORDER),
    **dict.fromkeys(
        ("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"), UPLOAD
    ),
    "hub_revision": UPLOAD,
    "per_device_eval_batch_size": "--chunk_tokens decides how much is encoded at once",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "an evaluation has the precision of training (--bf16)"),
    **dict.fromkeys(
        (
            *("do_predict", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
            *("batch_eval_metrics", "include_for_metrics", "prediction_loss_only"),
        ),
        NO_PREDICTIONS,
    ),
}

INHERITED = {*FIXED, *FREE, *NO_EFFECT, *REFUSED}

LOW_RANK = "it needs --optim_target_modules, which has no place here; --optim adafactor needs little memory"
IN_BACKWARD = "it steps within a backward, and a step here has one for each chunk"
OPTIMIZERS = {
    **{
        name + layerwise: LOW_RANK
        for name in ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw")
        for layerwise in ("", "_layerwise")
    },
    **dict.fromkeys(("lomo", "adalomo"), IN_BACKWARD),
    **dict.fromkeys(
        ("adamw_torch_4bit", "adamw_torch_8bit"),
        "its state is no plain tensor, which no checkpoint can hold; --optim adamw_8bit is small, too",
    ),
    "grokadamw": "a resumed run would learn other weights",
    **dict.fromkeys(
        ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
        "its weights would have to be averaged before each save",
    ),
}
ADAMW = ("adamw_torch", "adamw_torch_fused")
COUNTS = {"true": "all", "false": "no", "all": "all", "non_padding": "non_padding", "no": "no"}

PLATEAU = "reduce_lr_on_plateau"
DEFAULT_METRIC = "eval_mean"
# Flags of an evaluation, with the value that asks for none.
EVALUATION: dict[str, Any] = {
    "eval_strategy": "no",
    "eval_on_start": False,
    **dict.fromkeys(("do_eval", "eval_steps", "eval_delay"), None),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), None),
    **dict.fromkeys(("early_stopping_patience", "early_stopping_threshold"), None),
}

OF_NEWER_VERSIONS = ("dataloader_multiprocessing_context", "activation_checkpointing")

# (what is wrong with a value of a flag that is used, message). `f` holds the flags before Hugging Face changes them.
VALUES: tuple[tuple[Callable[[SimpleNamespace], bool], str], ...] = (
    (
        lambda f: f.lr_scheduler_type == "greedy",
        "--lr_scheduler_type greedy: not supported; reduce_lr_on_plateau follows the evaluations, too",
    ),
    (
        lambda f: f.lr_scheduler_type == PLATEAU and bool(f.deepspeed),
        "--lr_scheduler_type reduce_lr_on_plateau with --deepspeed: not supported; with --fsdp it is",
    ),
    (
        lambda f: f.eval_strategy == "no" and follows_evaluations(f),
        "--eval_strategy no: found a flag that follows the evaluations (--load_best_model_at_end, "
        "--early_stopping_patience, --save_strategy best or --lr_scheduler_type reduce_lr_on_plateau), wanted steps or "
        "epoch",
    ),
    (
        lambda f: f.load_best_model_at_end and f.save_strategy == "no",
        "--load_best_model_at_end with --save_strategy no: the best model would not be saved",
    ),
    (
        lambda f: f.early_stopping_threshold != 0 and f.early_stopping_patience is None,
        "--early_stopping_threshold {early_stopping_threshold}: has no effect without --early_stopping_patience",
    ),
    (
        lambda f: bool((f.use_muon or f.bf16_weights) and f.optim not in ADAMW),
        "--optim {optim}: found --use_muon or --bf16_weights, which go with "
        + " and ".join(ADAMW)
        + " only; leave one out",
    ),
    (
        lambda f: f.use_muon and bool(f.deepspeed),
        "--use_muon with --deepspeed: not supported, it holds a matrix as pieces of a flat vector; with --fsdp it is",
    ),
    (
        lambda f: f.bf16_weights and bool(f.deepspeed or f.fsdp),
        "--bf16_weights with --deepspeed or --fsdp: not supported, no test covers it; with DDP it is",
    ),
    (
        lambda f: f.ema_decay is not None and bool(f.deepspeed or f.fsdp),
        "--ema_decay with --deepspeed or --fsdp: not supported, the average is not sharded; with DDP it is",
    ),
    (lambda f: f.optim in OPTIMIZERS, "--optim {optim}: not supported, {why_no_optimizer}"),
    (
        lambda f: str(f.include_num_input_tokens_seen).lower() not in COUNTS,
        "--include_num_input_tokens_seen: found {include_num_input_tokens_seen!r}, wanted one of all, non_padding, no",
    ),
    (
        lambda f: f.dataloader_num_workers == 0 and f.dataloader_prefetch_factor is not None,
        "--dataloader_prefetch_factor {dataloader_prefetch_factor} with --dataloader_num_workers 0: nothing is read "
        "ahead",
    ),
    (
        lambda f: f.dataloader_num_workers == 0 and f.dataloader_multiprocessing_context is not None,
        "--dataloader_multiprocessing_context {dataloader_multiprocessing_context} with --dataloader_num_workers 0: "
        "no process is started",
    ),
    (
        lambda f: f.use_cpu and f.ddp_timeout != TrainingArguments.ddp_timeout,
        "--ddp_timeout {ddp_timeout}: has no effect with --use_cpu; --hang_timeout has",
    ),
    (
        lambda f: bool(f.gradient_checkpointing) and f.activation_checkpointing is False,
        "--gradient_checkpointing and --activation_checkpointing False: two names of one flag contradict each other",
    ),
)


def evaluates(flags: SimpleNamespace) -> bool:
    """Whether a run has something to evaluate on."""
    return bool(flags.eval_data or flags.eval_held_out)


def follows_evaluations(flags: SimpleNamespace) -> bool:
    """Whether the results of evaluations decide which weights are learnt or published."""
    return (
        flags.load_best_model_at_end
        or flags.save_strategy == "best"
        or flags.early_stopping_patience is not None
        or flags.lr_scheduler_type == PLATEAU
    )


def _check_evaluation(flags: SimpleNamespace, defaults: dict[str, Any]) -> None:
    """Refuse a flag of an evaluation where there is nothing to evaluate on."""
    asked = [name for name, none in EVALUATION.items() if getattr(flags, name) not in (defaults[name], none)]
    asked += ["save_strategy"] * (flags.save_strategy == "best")
    asked += ["lr_scheduler_type"] * (flags.lr_scheduler_type == PLATEAU)
    if asked and not evaluates(flags):
        raise UserError(
            f"--{asked[0]} {getattr(flags, asked[0])}: found nothing to evaluate on; add --eval_data PATH, or "
            "--eval_held_out ROWS"
        )


def check_inherited(flags: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse what has no place here, before Hugging Face's TrainingArguments are made of the flags.

    Args:
        defaults: what each flag is where it is not given.
    Raises:
        UserError: naming the flag, and why.
    """
    facts = SimpleNamespace(**(dict.fromkeys(OF_NEWER_VERSIONS) | flags))
    _check_evaluation(facts, defaults)
    for is_wrong, message in VALUES:
        if is_wrong(facts):
            raise UserError(message.format_map(vars(facts) | {"why_no_optimizer": OPTIMIZERS.get(str(facts.optim))}))
    for name, why in REFUSED.items():
        if name in flags and flags[name] != defaults[name]:  # older versions of transformers lack some
            raise UserError(f"--{name}: not supported, {why}")
    for name in TRACKIO:
        if flags.get(name) != defaults.get(name) and "trackio" not in str(flags["report_to"]):
            instead = "; wandb reads the environment variable WANDB_PROJECT" if name == "project" else ""
            raise UserError(f"--{name} {flags[name]}: only --report_to trackio reads it{instead}")


def normalised(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags with values that Hugging Face's parser does not take: several loggers, a count as a yes or no.

    Without anything to evaluate on, no evaluation; with one, its default metric.
    """
    report_to = [name.strip() for name in str(flags["report_to"]).split(",") if name.strip()]
    count = COUNTS[str(flags["include_num_input_tokens_seen"]).lower()]
    facts = SimpleNamespace(**flags)
    if not evaluates(facts):
        flags = flags | {"eval_strategy": "no", "eval_on_start": False}
    elif follows_evaluations(facts) and not flags["metric_for_best_model"]:
        flags = flags | {"metric_for_best_model": DEFAULT_METRIC}
    return flags | {"report_to": report_to or "none", "include_num_input_tokens_seen": count}
