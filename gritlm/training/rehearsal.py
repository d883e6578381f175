"""Build the optimizer, the schedule and the loggers of a run for one small layer, before data or weights are read.

So a package that is not installed, an option that does not exist or a missing login is named within a second.
"""

import copy
import functools
import math
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import SchedulerType, Trainer
from transformers.integrations import get_reporting_integration_callbacks

from gritlm.errors import UserError, one_line
from gritlm.training.arguments import EmbeddingTrainingArguments, TuningArguments
from gritlm.training.inherited_flags import PLATEAU
from gritlm.training.optimizers import OptimizerTrainer

SOME_STEPS = 1000  # assumed before the epochs are counted
ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
NO_SCHEDULE_OPTIONS = ("constant", "constant_with_warmup")
NO_WARM_UP = ("constant", PLATEAU)

# Options of checkpointing, those of torch and the two that transformers adds: what is wanted, whether a value is that.
CHECKPOINTING: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("use_reentrant", "preserve_rng_state", "debug", "early_stop", "offload"),
        ("true or false", lambda value: isinstance(value, bool)),
    ),
    "determinism_check": ("default or none", lambda value: value in ("default", "none")),
    "every_n_layers": ("a whole number above 0", lambda value: type(value) is int and value > 0),
}
NOT_REENTRANT = ("debug", "early_stop", "determinism_check")  # torch reads them only beside "use_reentrant": false


@contextmanager
def naming(flags: str) -> Iterator[None]:
    """Turn any error raised within into one line that begins with the flags."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{flags}: {one_line(error)}") from error


def rehearse(args: EmbeddingTrainingArguments, tuning: TuningArguments) -> None:
    """Refuse an optimizer, a schedule, checkpointing or a logger that cannot be built.

    Raises:
        UserError: in one line, naming the flag.
    """
    optimizer = _check_optimizer(args, tuning)
    if args.lr_scheduler_type == PLATEAU:
        _choose_direction(args)
    schedule(args, args.max_steps if args.max_steps > 0 else SOME_STEPS, optimizer)
    _check_checkpointing(args)
    _check_start_methods(args)
    if args.process_index == 0:  # the one that logs
        _check_loggers(args)


# ---- optimizer and schedule


def build_optimizer(
    args: EmbeddingTrainingArguments,
    model: nn.Module | None = None,
    tuning: TuningArguments | None = None,
    **changed: Any,
) -> torch.optim.Optimizer:
    """The Trainer's optimizer for a model, by default a linear layer. `changed` flags have these values instead."""
    trainer: Any = object.__new__(OptimizerTrainer)
    trainer.args, trainer.model, trainer.tuning = copy.copy(args), model or nn.Linear(1, 1), tuning or TuningArguments()
    vars(trainer.args).update(changed)
    trainer.optimizer = trainer.optimizer_cls_and_kwargs = None
    return trainer.create_optimizer()


def _options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    groups = reversed(optimizer.param_groups)
    return {name: value for group in groups for name, value in group.items() if name != "params"}


def _check_optimizer(args: EmbeddingTrainingArguments, tuning: TuningArguments) -> torch.optim.Optimizer:
    """Build it, and refuse options of it that it does not read."""
    flag = f"--optim {args.optim.value}"
    given, build = dict(_optim_args(args.optim_args)), functools.partial(build_optimizer, args, None, tuning)
    with naming(flag + (f" with --optim_args {args.optim_args}" if given else "")):
        optimizer = build()
    options = _options(optimizer)
    for name, value in given.items():
        rest = ",".join(f"{key}={text}" for key, text in given.items() if key != name)
        if _options(build(optim_args=rest)) == options and not _equals(options.get(name), value):
            instead = "; use --weight_decay" if name == "weight_decay" else ""
            raise UserError(f"--optim_args {args.optim_args}: {flag} does not read {name}{instead}")
    for name in ADAM:
        default = type(args).__dataclass_fields__[name].default
        if getattr(args, name) != default and _options(build(**{name: default})) == options:
            raise UserError(f"--{name} {getattr(args, name)}: {flag} does not read it")
    return optimizer


def _equals(value: Any, text: str) -> bool:
    """Whether an option's value is the one that the text gives."""
    try:
        return value is not None and float(value) == float(text)
    except (TypeError, ValueError):
        return str(value).lower() == text.lower()


def _optim_args(text: str | None) -> Iterator[tuple[str, str]]:
    for pair in (text or "").replace(" ", "").split(",") if text else ():
        name, _, value = pair.partition("=")
        if not name or not value or "=" in value:
            raise UserError(f"--optim_args {text}: found {pair!r}, wanted name=value,name=value")
        yield name, value


def _choose_direction(args: EmbeddingTrainingArguments) -> None:
    """Let a schedule that follows a metric know whether a greater one is better. torch's default is that it is not."""
    mode = "max" if args.greater_is_better else "min"
    options = {"mode": mode} | (args.lr_scheduler_kwargs or {})
    if options["mode"] != mode:
        better = "greater" if args.greater_is_better else "smaller"
        raise UserError(
            f"--lr_scheduler_kwargs {args.lr_scheduler_kwargs}: found mode {options['mode']}, wanted {mode}: "
            f"a {better} --metric_for_best_model {args.metric_for_best_model} is better"
        )
    args.lr_scheduler_kwargs = options


def schedule(
    args: EmbeddingTrainingArguments, steps: int, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[int], float]:
    """The share of --learning_rate at each step of a run of so many steps.

    Raises:
        UserError: the schedule lacks an option, has an unknown one, or gives a rate that is negative or not finite.
    """
    kind = SchedulerType(args.lr_scheduler_type).value
    options = args.lr_scheduler_kwargs
    given = f" with --lr_scheduler_kwargs {options}" if options else " without --lr_scheduler_kwargs"
    if options and kind in NO_SCHEDULE_OPTIONS:
        raise UserError(f"--lr_scheduler_kwargs {options}: --lr_scheduler_type {kind} has no options")
    default = type(args).__dataclass_fields__["warmup_steps"].default
    if kind in NO_WARM_UP and args.warmup_steps not in (0, default):
        instead = "; use constant_with_warmup" if kind == "constant" else ""
        raise UserError(f"--warmup_steps {args.warmup_steps}: --lr_scheduler_type {kind} has no warm-up{instead}")
    trainer: Any = object.__new__(Trainer)
    trainer.args, trainer.lr_scheduler = args, None
    with naming(f"--lr_scheduler_type {kind}{given}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = trainer.create_scheduler(steps, optimizer or torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0))
        if kind == PLATEAU:
            return lambda step: 1.0  # until a metric stops improving
        share: Callable[[int], float] = built.lr_lambdas[0]
        for step in sorted({0, 1, steps // 2, steps - 1}):
            if not 0 <= share(step) < math.inf:
                raise ValueError(f"the learning rate of step {step + 1} of {steps} would be {share(step)} of its peak")
    return share


def steps_in_all(args: EmbeddingTrainingArguments, steps_per_epoch: int) -> int:
    """Steps of the run, as the Trainer counts them."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)


def describe_schedule(args: EmbeddingTrainingArguments, steps: int) -> list[str]:
    """Warnings about a learning rate that never comes near what --learning_rate says.

    Raises:
        UserError: see `schedule`.
    """
    share, warm_up = schedule(args, steps), args.get_warmup_steps(steps)
    if args.learning_rate == 0:
        return ["--learning_rate 0: no weight will change"]
    if warm_up < steps or args.lr_scheduler_type in NO_WARM_UP:
        return []
    peak = max(share(0), share(steps - 1)) * args.learning_rate
    return [
        f"--warmup_steps {args.warmup_steps:g}: the warm-up takes {warm_up} steps, the run has {steps}; its learning "
        f"rate reaches {peak:.3g}, not --learning_rate {args.learning_rate:g}"
    ]


# ---- checkpointing, processes, compiler


def _check_checkpointing(args: EmbeddingTrainingArguments) -> None:
    flag = "--gradient_checkpointing_kwargs (--activation_checkpointing_kwargs)"
    options: Any = args.gradient_checkpointing_kwargs or {}
    if options and not args.gradient_checkpointing:
        raise UserError(f"{flag} {options}: has no effect without --gradient_checkpointing")
    for name, value in options.items():
        if name not in CHECKPOINTING:
            raise UserError(f"{flag}: found {name!r}, wanted some of {', '.join(CHECKPOINTING)}")
        if name in NOT_REENTRANT and options.get("use_reentrant", True):
            raise UserError(f'{flag} {options}: {name}: only read beside "use_reentrant": false')
        wanted, is_right = CHECKPOINTING[name]
        if not is_right(value):
            raise UserError(f"{flag} {options}: {name}: found {value!r}, wanted {wanted}")


def _check_start_methods(args: EmbeddingTrainingArguments) -> None:
    name, known = getattr(args, "dataloader_multiprocessing_context", None), multiprocessing.get_all_start_methods()
    if name is not None and name not in known:
        raise UserError(f"--dataloader_multiprocessing_context {name}: wanted one of {', '.join(known)}")


def check_compiler(backend: str | None, mode: str | None) -> None:
    """Refuse a compiler that torch or accelerate does not know."""
    if backend is None and mode is None:
        return
    from torch._dynamo import list_backends
    from torch._inductor import list_mode_options

    backends = [name for name in list_backends(()) if name.upper() in set(DynamoBackend)]  # accelerate reads it, too
    if backend not in (None, *backends):
        raise UserError(f"--torch_compile_backend {backend}: wanted one of {', '.join(backends)}")
    modes = list(list_mode_options())
    if mode not in (None, *modes):
        raise UserError(f"--torch_compile_mode {mode}: wanted one of {', '.join(modes)}")


# ---- loggers


def _check_loggers(args: EmbeddingTrainingArguments) -> None:
    flag = f"--report_to {','.join(args.report_to or [])}"
    with naming(flag):
        callbacks = get_reporting_integration_callbacks(args.report_to)
    for callback in callbacks:
        if problem := _why_not(callback):
            raise UserError(f"{flag}: {problem}")
    if "wandb" in args.report_to:
        with naming(flag):
            _check_wandb()


def _why_not(callback: Callable[[], Any]) -> str:
    """Why a logger cannot be made, or ""."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # a half-built one complains as it goes
    try:
        callback()
        return ""
    except Exception as error:
        return one_line(error)
    finally:
        sys.unraisablehook = hook


def _check_wandb() -> None:
    """Refuse a run for which wandb would ask for a login, or fail, at its first step. It asks no server."""
    import requests
    import wandb

    settings = wandb.setup().settings
    online = settings.mode not in ("offline", "dryrun", "disabled")
    if online and not (
        settings.api_key or settings.identity_token_file or requests.utils.get_netrc_auth(settings.base_url)
    ):
        raise ValueError(
            "wandb knows no login on this machine; run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"
        )
