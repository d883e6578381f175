"""Flags of the loss that contradict one another or have no effect, looked at as each data set of the run has them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from gritlm.errors import UserError
from gritlm.training.arguments import DataArguments, ObjectiveArguments, RunArguments
from gritlm.training.flag_rules import check_ranges
from gritlm.training.set_settings import OF_A_SET, objectives_of, read_set_settings

UNIT_VECTORS = ("debiased", "sigreg_weight", "spread_out_weight", "angle_weight", "matryoshka_dims", "teacher_weight")
TERM_WEIGHTS = [name for name in vars(ObjectiveArguments) if name.endswith("_weight")]
DEFAULTS = {f.name: f.default for group in (DataArguments, ObjectiveArguments) for f in dataclasses.fields(group)}

# (what is wrong with the flags of a data set, message)
RULES: tuple[tuple[Callable[[SimpleNamespace], bool], str], ...] = (
    (
        lambda f: not f.in_batch_negatives and (f.same_tower or f.symmetric),
        "--in_batch_negatives False: found --same_tower or --symmetric, which contrast with other rows; choose one",
    ),
    (
        lambda f: f.contrastive_weight > 0 and not f.in_batch_negatives and f.train_group_size < 2,
        "--in_batch_negatives False with --train_group_size 1: no negative is left; raise --train_group_size",
    ),
    (
        lambda f: f.global_batch_size < 2 and any((f.cosent_weight, f.angle_weight, f.spread_out_weight)),
        "--global_batch_size 1: found --cosent_weight, --angle_weight or --spread_out_weight, which compare the "
        "queries of a batch; raise it",
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
        lambda f: not f.normalized and any(getattr(f, name) for name in UNIT_VECTORS),
        "--normalized False: found one of "
        + ", ".join(f"--{name}" for name in UNIT_VECTORS)
        + ", which need unit vectors",
    ),
    (
        lambda f: (
            bool(f.matryoshka_weights and f.matryoshka_dims) and len(f.matryoshka_weights) != len(f.matryoshka_dims)
        ),
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
)

CONTRASTIVE = (
    *("temperature", "negatives_cross_device", "negatives_ring", "same_tower", "symmetric", "in_batch_negatives"),
    *("hardness_hard", "hardness_in_batch", "focal_gamma", "debiased", "guide_margin"),
    *("false_negative_margin", "false_negative_relative_margin"),
)
OF_EVERY_WIDTH = ("contrastive_weight", "cosent_weight", "angle_weight", "distill_weight", "margin_mse_weight")

# (flags, and those of which one must be on, else the flags have no effect)
NEEDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (CONTRASTIVE, ("contrastive_weight",)),
    (("negatives_cross_device", "negatives_ring", "hardness_in_batch"), ("in_batch_negatives",)),
    (("negatives_ring",), ("negatives_cross_device",)),
    (("hardness_hard",), ("train_group_size",)),
    (("tau_plus",), ("debiased",)),
    (
        ("max_positives",),
        ("contrastive_weight", "distill_weight", "margin_mse_weight", "teacher_weight", "sigreg_weight"),
    ),
    (("matryoshka_dims",), OF_EVERY_WIDTH),
    (("matryoshka_weights",), ("matryoshka_dims",)),
    (("cosent_temperature",), ("cosent_weight", "angle_weight")),
    (("teacher_temperature", "student_temperature"), ("distill_weight",)),
    (("margin_mse_scale",), ("margin_mse_weight",)),
    (("teacher_loss",), ("teacher_weight",)),
    (("teacher_vectors",), ("teacher_weight", "guide_margin")),
)


def is_on(value: Any, name: str) -> bool:
    """Whether a flag changes the loss: a margin also at 0."""
    if name == "train_group_size":
        return value > 1
    return value is not None if name.endswith("margin") else bool(value)


def check_objective(run: RunArguments, names: Sequence[str]) -> None:
    """Refuse flags of the loss that are out of range or contradict one another in a data set, or have no effect in any.

    Raises:
        UserError: also for settings of a data set that is not there. It names the data set where they differ.
    """
    flags, settings = run.flags(), read_set_settings(run.data.num_samples)
    losses = objectives_of(run, names)
    used = {name: flags | vars(args) for name, args in losses.items() if settings.get(name, {}).get("rows") != 0}
    for name, merged in used.items():
        try:
            check_ranges(merged)
            for is_wrong, message in RULES:
                if is_wrong(SimpleNamespace(**merged)):
                    raise UserError(message.format_map(merged))
            _check_effects([merged], [key for key in settings.get(name, {}) if key in OF_A_SET])
        except UserError as error:
            raise UserError(
                f"--num_samples {run.data.num_samples}: {name}: {error}" if settings else str(error)
            ) from error
    for key in DEFAULTS:
        _check_effects([merged for name, merged in used.items() if key not in settings.get(name, {})], [key])


def _check_effects(of_sets: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Refuse a flag with a value unlike its default that has no effect in any of the data sets."""
    for name, (dependent, needed) in itertools.product(names, NEEDS):
        given = name in dependent and of_sets and all(flags[name] != DEFAULTS[name] for flags in of_sets)
        if given and not any(is_on(flags[other], other) for flags in of_sets for other in needed):
            first, *others = needed  # only the first may be on by default
            absent = others if DEFAULTS[first] else needed
            why = [f"with --{first} {of_sets[0][first]}"] if DEFAULTS[first] else []
            why += [f"without --{' or --'.join(absent)}"] if absent else []
            value = of_sets[0][name]
            raise UserError(f"--{name} {value} {' and '.join(why)} has no effect; leave one of them out")


def _falls(widths: Sequence[int]) -> bool:
    return all(width > 0 for width in widths) and all(a > b for a, b in itertools.pairwise(widths))
