"""What a run or a plan checks and says between reading its data and loading its weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from gritlm.data.batch_plan import Plan
from gritlm.data.records import RecordSet
from gritlm.data.row_scores import count_scores
from gritlm.data.teacher_vectors import TeacherVectors
from gritlm.errors import UserError
from gritlm.models.attention import PACKED
from gritlm.models.checks import check_tokenizer
from gritlm.models.families import longest_text
from gritlm.models.probe import choose_attention
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import TextTokenizer
from gritlm.report.servers import Served, describe_servers
from gritlm.training.adapters import describe_adapter
from gritlm.training.arguments import DataArguments, ObjectiveArguments, RunArguments, contract_values, papers_values
from gritlm.training.disk_space import check_disk_space
from gritlm.training.evaluation_data import EvaluationData, check_instructions
from gritlm.training.negatives import describe_negatives
from gritlm.training.objective import describe_objective, needs_projection
from gritlm.training.optimizers import describe_tuning
from gritlm.training.rehearsal import describe_schedule, steps_in_all
from gritlm.training.set_settings import LENGTHS, lengths_of, objectives_of
from gritlm.training.setup import build_text_tokenizer, clip, describe, show_examples, used_sets
from gritlm.training.text_report import report_on_texts


def describe_run(
    run: RunArguments,
    plan: Plan,
    records: list[RecordSet],
    config: PreTrainedConfig,
    ranks: int,
    evaluation: EvaluationData,
) -> tuple[TextTokenizer, list[str], list[str]]:
    """The tokenizer of the run, the lines to print, and the warnings.

    Raises:
        UserError: the base's tokenizer does not fit, there is nothing to contrast, a width of --matryoshka_dims is not
            below the model's, or the disk has too little room.
    """
    used = used_sets(plan, records)
    text_tokenizer = build_text_tokenizer(run, used)
    check_tokenizer(run.model.model_name_or_path, text_tokenizer.tokenizer, config)
    check_lengths(run, config)
    check_instructions(evaluation, text_tokenizer)
    names = [r.name for r in records]
    losses, lengths_by_set = objectives_of(run, names), lengths_of(run, names)
    by_set = [losses[r.name] for r in used]
    unread = check_sets(run, by_set, used)
    texts, warnings = report_on_texts(used, text_tokenizer, run.data, lengths_by_set)
    model = Served(text_tokenizer.contract, config.model_type, run.model.attn == "cc", bool(run.model.projection))
    negatives, doubts = describe_negatives(plan, run, records, ranks, text_tokenizer)
    width = run.model.projection or config.hidden_size
    others = [(r.name, args) for r, args in zip(used, by_set, strict=True) if args != run.objective]
    untested = choose_attention(config, run.model.trust_remote_code)[1]
    lines = [
        *([untested] if untested and run.model.attn_implementation == PACKED else []),
        *describe_base(run, text_tokenizer.contract),
        *describe_adapter(run, config),
        *describe_servers(model, contract_name(run)),
        *describe(plan, run, records, ranks),
        *([describe_objective(run.objective, width)] if len(others) < len(used) else ["loss of each data set"]),
        *(f"  {name}: {describe_objective(args, width)}" for name, args in others),
        *negatives,
        *evaluation.lines,
        *describe_tuning(run.tuning),
        *check_disk_space(run, config, plan.steps_per_epoch),
        *texts,
        *show_examples(text_tokenizer, used, lengths_by_set),
    ]
    steps = steps_in_all(run.training, plan.steps_per_epoch)
    warnings += [*unread, *doubts, *evaluation.warnings, *describe_schedule(run.training, steps)]
    return text_tokenizer, lines, warnings


def check_sets(run: RunArguments, by_set: Sequence[ObjectiveArguments], used: list[RecordSet]) -> list[str]:
    """Refuse data from which the run's flags cannot learn. Returns the lines of `check_scores`."""
    rate, layers = run.tuning.projection_learning_rate, run.model.projection or any(map(needs_projection, by_set))
    if rate is not None and not layers:
        raise UserError(
            f"--projection_learning_rate {rate}: found no projection to train, wanted --projection, or "
            "--teacher_weight with --teacher_loss cosine or mse"
        )
    lines = check_scores(by_set, used, run.data)
    for r in used:
        if run.data.eval_held_out and r.scored_rows[1]:
            raise UserError(f"--eval_held_out: found scored pairs in {r.name}, wanted an STS set in --eval_data")
    if run.objective.teacher_vectors:
        TeacherVectors(run.objective.teacher_vectors).check(taught(by_set, used))
    return lines


def check_lengths(run: RunArguments, config: PreTrainedConfig) -> None:
    """Refuse texts for which the model has no learned position. Rotary positions have no end.

    Raises:
        UserError: a limit in tokens is too high.
    """
    longest = None if getattr(config, "rope_parameters", None) else longest_text(config)
    for flag in LENGTHS:
        if longest and (given := getattr(run.data, flag)) > longest:
            raise UserError(f"--{flag} {given}: found a model of at most {longest} positions, wanted no more")


def taught(by_set: Sequence[ObjectiveArguments], records: list[RecordSet]) -> list[RecordSet]:
    """The data sets whose texts need a teacher's vectors: all, where those of one row are compared with other rows'."""
    if any(args.guide_margin is not None or (args.teacher_weight and args.teacher_loss == "scores") for args in by_set):
        return records
    return [r for args, r in zip(by_set, records, strict=True) if args.teacher_weight]


# ---- the base


def describe_base(run: RunArguments, contract: TextContract) -> list[str]:
    """What the base says of itself, what this run does, and the flags that restore the paper's recipe."""
    base, now, paper = run.base, run.flags(), papers_values()
    said = {name: getattr(base, name) for name in paper if getattr(base, name) is not None}
    lines = [f"base: its {name} is not used: {found}" for name, found in base.unusable.items()]
    lines += [f"base: {note}" for note in base.notes]
    if (prompt := base.prompts.get("query")) and not contract.prompts.get("query"):
        prepare = "gritlm prepare --instruction_template puts it there"
        lines.append(f"base: its query prompt {clip(prompt)} is in no row, and the model gets none; {prepare}")
    if not said:
        return lines
    embedder = base.pool_instruction is not None

    def settings(values: dict[str, Any], prompts: dict[str, str]) -> str:
        parts = [f"{name} {values[name]}" for name in said]
        return ", ".join([*parts, f"prompts {_list_prompts(prompts)}"] if embedder else parts)

    taken = [name for name, value in said.items() if value == now[name] != paper[name]]
    restore = " ".join(f"--{name} {0 if paper[name] is None else paper[name]}" for name in taken)
    hint = f"; the paper's recipe: {restore}" if restore else ""
    return [f"base: {settings(said, base.prompts)} -> this run: {settings(now, contract.prompts)}{hint}", *lines]


def contract_name(run: RunArguments) -> str:
    """Whose text contract a run has, in words."""
    if run.data.contract:
        return run.data.contract
    if run.base.pool_instruction is not None:
        return "of the base (--contract replaces it)"
    flags, paper = run.flags(), contract_values("paper", run.base)
    return "paper" if paper.items() <= flags.items() else "of the flags"


def _list_prompts(prompts: dict[str, str]) -> str:
    given = [f"{name} {clip(prompt)}" for name, prompt in prompts.items() if prompt]
    return ", ".join([*given[:3], *([f"and {len(given) - 3} more"] if given[3:] else [])]) or "none"


# ---- scores

# Flags of terms that read scores, and what each needs.
READ_SCORES = {
    "cosent_weight": "pairs with different scores",
    "angle_weight": "pairs with different scores",
    "distill_weight": "scores of two or more passages that --train_group_size lets into a group",
    "margin_mse_weight": "scores of a positive and of a negative",
}


def check_scores(by_set: Sequence[ObjectiveArguments], records: list[RecordSet], data: DataArguments) -> list[str]:
    """Refuse data whose scores its loss cannot learn from, and scored pairs that InfoNCE would train as positives.

    Returns:
        a line for each data set with scores that its loss does not read, and for each term that reads some rows only.
    Raises:
        UserError: naming the data set, and the term.
    """
    lines = []
    for args, record_set in zip(by_set, records, strict=True):
        asked = [name for name in READ_SCORES if getattr(args, name)]
        (scored, pairs), errors, name = record_set.scored_rows, record_set.score_errors, record_set.name
        if asked and errors:
            raise UserError(f"--{asked[0]}: {errors[0]}")
        if asked and not scored:
            keys = "score, pos_scores and neg_scores, or scores"
            raise UserError(f"--{asked[0]}: found no scores in {name}, wanted {keys} in its rows")
        if pairs and args.contrastive_weight and "score" not in data.ignored:
            raise UserError(
                f"{name}: found the key 'score' in {pairs} rows, which would all be trained as positives; use "
                "--contrastive_weight 0 with --cosent_weight 1, or gritlm prepare --label_column score; "
                "--ignore_columns score trains on all rows"
            )
        for term in asked:
            usable, found = _usable_rows(term, record_set, data)
            if not usable:
                raise UserError(
                    f"--{term}: found {found} in {name}, wanted {READ_SCORES[term]}; nothing would be learnt"
                )
            if usable < len(record_set):
                lines.append(f"{name}: --{term} learns from the scores of {usable} of {len(record_set)} rows")
        if not asked and scored:
            lines.append(f"{name}: scores of {scored} rows, which this loss does not read")
        if errors:
            lines.append(f"{name}: scores of {len(errors)} rows that no loss can read, the first: {errors[0]}")
    return lines


def _usable_rows(term: str, record_set: RecordSet, data: DataArguments) -> tuple[int, str]:
    """How many rows have scores that a term can learn from, and what the rows have."""
    positives, negatives, different = count_scores(record_set.table)
    drawn = np.minimum(negatives, data.train_group_size - 1)
    found = f"scores of positives in {(positives > 0).sum()} rows and of negatives in {(negatives > 0).sum()}"
    if term in ("cosent_weight", "angle_weight"):
        usable = (positives > 0) & (different > 1)
        found += f", with {different} different scores of positives"
    elif term == "distill_weight":
        usable = np.minimum(positives, data.max_positives) + drawn > 1
    else:
        usable = (positives > 0) & (np.minimum(positives, data.max_positives) + drawn > 1)
    return int(usable.sum()), found
