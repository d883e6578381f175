"""Refuse flags that are missing, wrong, or contradict one another, before data or weights are read."""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainingArguments

from gritlm.errors import UserError, one_line
from gritlm.models.base import BaseSettings, read_base
from gritlm.models.pooling import POOLING
from gritlm.report.servers import PORTABLE_POOLING
from gritlm.strict_json import parse_json
from gritlm.training.arguments import EXAMPLES, GROUPS, DataArguments, ModelArguments, ObjectiveArguments, RunArguments
from gritlm.training.engine_files import check_engine_file
from gritlm.training.environment import refuse_environment
from gritlm.training.flag_parser import FlagParser, make_parser
from gritlm.training.inherited_flags import check_inherited, normalised
from gritlm.training.rehearsal import check_compiler, rehearse
from gritlm.training.set_settings import OF_A_SET, read_set_settings
from gritlm.training.setup import settle

REQUIRED = ("model_name_or_path", "train_data", "output_dir")
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
        ),
    ),
    (
        "0 or more",
        lambda x: 0 <= x < math.inf,
        (
            *("max_example_num_per_dataset", "projection", "hang_timeout", "learning_rate", "weight_decay"),
            *("max_grad_norm", "save_total_limit", "dataloader_num_workers", "batches"),
            *("eval_held_out", "eval_delay", "early_stopping_threshold", "focal_gamma", "spread_out_weight"),
            *("contrastive_weight", "cosent_weight", "angle_weight", "distill_weight", "margin_mse_weight"),
            *("teacher_weight", "guide_margin"),
            *("hardness_hard", "hardness_in_batch", "false_negative_margin", "false_negative_relative_margin"),
        ),
    ),
    ("a number from 0 to below 1", lambda x: 0 <= x < 1, ("adam_beta1", "adam_beta2", "sigreg_weight")),
    ("a number above 0 and below 1", lambda x: 0 < x < 1, ("tau_plus",)),
    ("0 to 4294967295", lambda x: 0 <= x < 2**32, ("seed",)),
    ("a number above 0, or -1: --num_train_epochs decides", lambda x: x == -1 or x > 0, ("max_steps",)),
    (
        f"{SHARE}, above 0",
        lambda x: 0 < x < math.inf and (x < 1 or x % 1 == 0),
        ("save_steps", "logging_steps", "eval_steps"),
    ),
    (SHARE, lambda x: 0 <= x < math.inf and (x < 1 or x % 1 == 0), ("warmup_steps",)),
)

CLUSTER_SIZE = DataArguments.cluster_size
TAU_PLUS = ObjectiveArguments.tau_plus
UNIT_VECTORS = ("debiased", "sigreg_weight", "spread_out_weight", "angle_weight", "matryoshka_dims", "teacher_weight")
TERM_WEIGHTS = [name for name in vars(ObjectiveArguments) if name.endswith("_weight")]

# Flags that hold a JSON object, with an example.
OBJECTS = {
    "lr_scheduler_kwargs": '{"num_cycles": 2}',
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
    "activation_checkpointing_kwargs": '{"use_reentrant": false}',
}

# (what is wrong with these flags, message). `ranks` is the number of processes; `training` has HF's properties.
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
        lambda f: not f.in_batch_negatives and (f.same_tower or f.symmetric),
        "--in_batch_negatives False: found --same_tower or --symmetric, which contrast with other rows; choose one",
    ),
    (
        lambda f: not f.in_batch_negatives and f.train_group_size < 2,
        "--in_batch_negatives False with --train_group_size 1: no negative is left; raise --train_group_size",
    ),
    (
        lambda f: not f.in_batch_negatives and f.hardness_in_batch > 0,
        "--hardness_in_batch with --in_batch_negatives False: there is none to weight; leave one out",
    ),
    (
        lambda f: f.max_positives > 1 and (f.same_tower or f.symmetric),
        "--max_positives {max_positives}: found --same_tower or --symmetric, which start from one positive; choose one",
    ),
    (
        lambda f: not any(getattr(f, name) for name in TERM_WEIGHTS),
        "--contrastive_weight 0: no other term has a weight, so nothing is trained; give one a weight",
    ),
    (
        lambda f: not f.teacher_vectors and (f.teacher_weight > 0 or f.guide_margin is not None),
        "--teacher_weight and --guide_margin: found no --teacher_vectors, wanted the folder of gritlm encode --rows",
    ),
    (
        lambda f: bool(f.teacher_vectors) and not f.teacher_weight and f.guide_margin is None,
        "--teacher_vectors {teacher_vectors}: wanted --teacher_weight or --guide_margin; alone it has no effect",
    ),
    (
        lambda f: not f.normalized and any(getattr(f, name) for name in UNIT_VECTORS),
        "--normalized False: found one of "
        + ", ".join(f"--{name}" for name in UNIT_VECTORS)
        + ", which need unit vectors",
    ),
    (
        lambda f: f.tau_plus != TAU_PLUS and not f.debiased,
        "--tau_plus {tau_plus} without --debiased has no effect",
    ),
    (
        lambda f: bool(f.matryoshka_weights) and len(f.matryoshka_weights) != len(f.matryoshka_dims or ()),
        "--matryoshka_weights {matryoshka_weights}: wanted one for each of --matryoshka_dims {matryoshka_dims}",
    ),
    (
        lambda f: any(not 0 < weight < math.inf for weight in f.matryoshka_weights or ()),
        "--matryoshka_weights {matryoshka_weights}: wanted numbers above 0",
    ),
    (
        lambda f: not _falls(f.matryoshka_dims or ()),
        "--matryoshka_dims {matryoshka_dims}: wanted whole numbers above 0 that fall, such as 256 128 64",
    ),
    (
        lambda f: f.emb_q_only and f.emb_p_only,
        "--emb_q_only and --emb_p_only: choose one; together no weight would get a gradient",
    ),
    (
        lambda f: not _is_auto_or_gb(f.activation_memory),
        "--activation_memory: found {activation_memory!r}, wanted auto, or GB from 0 up",
    ),
    (
        lambda f: f.negatives_ring and not f.negatives_cross_device,
        "--negatives_ring sends other ranks' passages round, but --negatives_cross_device False uses none; choose one",
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
        "{global_batch_size} on {ranks} ranks; leave it out",
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


def _is_within(inner: str, outer: str) -> bool:
    return Path(inner).resolve().is_relative_to(Path(outer).resolve())


def _is_auto_or_gb(text: str) -> bool:
    try:
        return text == "auto" or 0 <= float(text) < math.inf
    except ValueError:
        return False


def parse(argv: list[str]) -> RunArguments:
    """The flags of `gritlm train`, checked.

    Raises:
        UserError: for a flag that is unknown, wrong, missing, or contradicts another.
    """
    run, _ = build(make_parser("train", GROUPS, EXAMPLES), argv)
    check(run, run.training.world_size)
    return run


def build(
    parser: FlagParser, argv: list[str], more: type | None = None, replaced: dict[str, Any] | None = None
) -> tuple[RunArguments, Any]:
    """The groups from a command line, and one group more. `replaced` flags are checked, then replaced.

    Flags that were not given and that the base decides get their values here.

    Raises:
        UserError: what a group's __post_init__ raises; the base's own settings are damaged, or cannot be taken up.
    """
    unset = vars(parser.parse_args([]))
    flags = vars(parser.parse_args(argv))
    for name in ("deepspeed", "fsdp_config"):
        check_engine_file(name, flags[name], flags)
    refuse_environment(flags)
    for name in OBJECTS:
        check_object(name, flags.get(name))
    check_ranges(flags)
    check_inherited(flags, unset)
    check_compiler(flags["torch_compile_backend"], flags["torch_compile_mode"])
    flags = normalised(flags) | (replaced or {})
    try:
        groups = parser.parse_dict(flags)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(one_line(error)) from error
    model, data, objective, training = groups[:4]
    rehearse(training)
    base = read_base(model.model_name_or_path)
    check_base_settings(model, base)
    model, data = settle(model, base, data.contract), settle(data, base, data.contract)
    run = RunArguments(model, data, objective, training, base, parser.command)
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
    for name, own in read_set_settings(run.data.num_samples).items():
        try:
            check_flags(run, flags | {key: value for key, value in own.items() if key in OF_A_SET}, ranks, here)
        except UserError as error:
            raise UserError(f"--num_samples {run.data.num_samples}: {name}: {error}") from error
    check_flags(run, flags, ranks, here)


def check_flags(run: RunArguments, flags: dict[str, Any], ranks: int, here: bool) -> None:
    """Refuse flags that contradict one another: those of the run, or with the settings of a data set on top."""
    check_ranges(flags)
    training = run.training
    facts = SimpleNamespace(**flags, ranks=ranks, training=training)
    for is_wrong, message in (*RULES, *(MACHINE_RULES if here else ())):
        if is_wrong(facts):
            engine = "--deepspeed" if training.deepspeed else "--fsdp"
            longest = max(run.data.query_max_len, run.data.passage_max_len)
            known = vars(facts) | {"engine": engine, "gpus": training.n_gpu, "longest": longest}
            raise UserError(message.format_map(known))


def check_ranges(flags: dict[str, Any]) -> None:
    for wanted, is_right, names in RANGES:
        for name in names:
            if flags.get(name) is not None and not is_right(flags[name]):
                raise UserError(f"--{name}: found {flags[name]}, wanted {wanted}")


def check_object(name: str, text: str | None) -> None:
    """Refuse options of a schedule or of checkpointing that are no JSON object."""
    if not text:
        return
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UserError(f"--{name}: found {text!r}, wanted a JSON object such as {OBJECTS[name]}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"--{name}: found {text!r}, wanted a JSON object such as {OBJECTS[name]}")


def _falls(widths: Sequence[int]) -> bool:
    return all(width > 0 for width in widths) and all(a > b for a, b in itertools.pairwise(widths))
