"""What a run evaluates on: the sets of --eval_data, and the slices of its data that --eval_held_out keeps out."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from gritlm.data.batch_plan import CORPUS, Plan
from gritlm.data.records import Record, RecordSet
from gritlm.data.rows import text_id
from gritlm.errors import UserError
from gritlm.evaluation.metrics import METRICS
from gritlm.evaluation.read_sets import read_sets
from gritlm.evaluation.sets import EvaluationSet, RetrievalSet, StsSet
from gritlm.evaluation.trained_on import count_trained_on
from gritlm.models.text import Text
from gritlm.models.tokenizer import TextTokenizer
from gritlm.training.arguments import RunArguments
from gritlm.training.objective import without_teacher
from gritlm.training.set_settings import objectives_of
from gritlm.training.setup import used_sets
from gritlm.training.terms import TERMS

TRAINING_PASSAGES = 4000  # added to the corpus of a slice, at most
MEAN, LOSS = "eval_mean", "eval_loss"


@dataclass
class EvaluationData:
    """What a run evaluates on.

    Attributes:
        sets: the given sets, then a slice of each data set.
        loss_batches: the held-out rows, (data set number, row number), in batches of one data set.
        lines, warnings: what the run says about them.
    """

    sets: list[EvaluationSet]
    loss_batches: list[list[tuple[int, int]]]
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics of an evaluation."""
        names = [f"eval_{data.name}_{metric}" for data in self.sets for metric in metrics_of(data)]
        return [MEAN, *([LOSS] if self.loss_batches else []), *names]


def metrics_of(data: EvaluationSet) -> list[str]:
    if isinstance(data, RetrievalSet):
        return list(METRICS)
    return ["spearman"] if isinstance(data, StsSet) else ["accuracy"]


def gather_evaluation_data(
    run: RunArguments, plan: Plan, records: list[RecordSet], given: list[EvaluationSet]
) -> EvaluationData:
    """Put together what the run evaluates on, before its model is loaded.

    Raises:
        UserError: two sets have one name, or --metric_for_best_model is no metric of them.
    """
    slices = [slice_of(plan, records, number) for number in range(len(records)) if len(plan.held_rows[number])]
    by_set = without_teacher(objectives_of(run, [r.name for r in records]).values())
    group = [min(run.data.train_group_size, record_set.longest_group) for record_set in records]
    several = [size > 1 or len(held) > 1 for size, held in zip(group, plan.held_rows, strict=True)]
    has_loss = [ok and any(t.weight(args) for t in TERMS.values()) for ok, args in zip(several, by_set, strict=True)]
    data = EvaluationData([*given, *slices], list(_loss_batches(plan, has_loss)))
    names = [found.name for found in data.sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--eval_data: found two sets with the name {twice[0]}, wanted different names; rename one")
    metric = run.training.metric_for_best_model
    if metric in (LOSS, LOSS.removeprefix("eval_")) and slices and not data.loss_batches:
        raise UserError(
            f"--metric_for_best_model {metric}: found no loss of the held-out rows: --teacher_weight is of training "
            f"alone, and one row without a negative has none; wanted another metric, such as {MEAN}"
        )
    if metric and metric not in data.metrics and f"eval_{metric}" not in data.metrics:
        raise UserError(
            f"--metric_for_best_model {metric}: found no such metric, wanted one of {', '.join(data.metrics[:20])}"
            f"{', ...' if len(data.metrics) > 20 else ''}"
        )
    if data.sets:
        data.lines = [f"evaluation: {_when(run)}", *(f"  {found.name}: {_size(found)}" for found in data.sets)]
        notes = [f"{found.name}: {note}" for found in given for note in found.notes]
        seen = {found.name: count_trained_on(found, used_sets(plan, records), plan.held_out.texts) for found in given}
        data.warnings = [*notes, *(f"{name}: {count}" for name, count in seen.items() if count)]
    return data


def given_sets(run: RunArguments) -> list[EvaluationSet]:
    """The sets of --eval_data.

    Raises:
        UserError: a path holds no set, or something in it is wrong.
    """
    return read_sets(run.data.eval_data) if run.data.eval_data else []


def check_instructions(data: EvaluationData, text_tokenizer: TextTokenizer) -> None:
    """Refuse an instruction of a set that leaves no room, or can share a token with its text.

    Raises:
        UserError: naming the set and the instruction.
    """
    limit = text_tokenizer.contract.query_max_len
    for found in data.sets:
        if isinstance(found, RetrievalSet):
            for instruction in sorted(set(found.instructions or ())):
                text_tokenizer.check_instruction(instruction, limit, f"--eval_data {found.name}: --query_max_len")


# ---- slices of the training data


def slice_of(plan: Plan, records: list[RecordSet], number: int) -> RetrievalSet:
    """The held-out rows of a data set. Its corpus: their passages, and some of the rows that are trained on."""
    record_set = records[number]
    queries: dict[int, Text] = {}
    grades: dict[int, dict[str, int]] = {}
    corpus: dict[int, str] = {}
    for record in _read(record_set, plan.held_rows[number]):
        queries[record.query_id] = record.query
        grades.setdefault(record.query_id, {}).update({_name(key): 1 for key in record.positive_ids})
        corpus |= _passages(record)
    limit = len(corpus) + TRAINING_PASSAGES
    rows = np.random.default_rng((plan.seed, CORPUS, number)).permutation(plan.training_rows(number))
    for record in _read(record_set, rows):
        if len(corpus) >= limit:
            break
        corpus |= {key: text for key, text in _passages(record).items() if key not in corpus}
    kept = list(corpus)[:limit]
    ids: dict[str, None] = {}
    for key, query in queries.items():  # a passage with the text of a query gets its id: it is the query itself
        own = _name(text_id(query.text))
        ids[own if own not in ids else f"{own}-{_name(key)}"] = None
    instructions = [query.instruction for query in queries.values()]
    return RetrievalSet(
        f"{record_set.name}_held_out",
        [query.text for query in queries.values()],
        list(ids),
        [corpus[key] for key in kept],
        list(map(_name, kept)),
        [grades[key] for key in queries],
        instructions,
    )


def _read(record_set: RecordSet, rows: np.ndarray) -> Iterator[Record]:
    return (record_set[row] for row in rows.tolist())


def _passages(record: Record) -> dict[int, str]:
    passages = [*record.positives, *record.negatives]
    return dict(zip([*record.positive_ids, *record.negative_ids], [text.text for text in passages], strict=True))


def _name(key: int) -> str:
    return f"{key % 2**64:016x}"


def _loss_batches(plan: Plan, has_loss: list[bool]) -> Iterator[list[tuple[int, int]]]:
    """The held-out rows of each data set with a loss, in batches that are about equal and no larger than the run's."""
    for number, rows in enumerate(plan.held_rows):
        if len(rows) and has_loss[number]:
            for part in np.array_split(rows, -(-len(rows) // plan.batch_size)):
                yield [(number, row) for row in part.tolist()]


# ---- what is said about them


def _when(run: RunArguments) -> str:
    args, parts = run.training, ["before the first step"] if run.training.eval_on_start else []
    if args.eval_strategy == "epoch":
        parts.append("after each epoch")
    elif args.eval_strategy == "steps":
        share = args.eval_steps < 1
        parts.append(f"after each {args.eval_steps:.4g} of the steps" if share else f"every {args.eval_steps:g} steps")
    return ", ".join([*parts, "after the last step"])


def _size(data: EvaluationSet) -> str:
    if isinstance(data, RetrievalSet):
        return f"{len(data.queries)} queries, {len(data.corpus)} passages"
    if isinstance(data, StsSet):
        return f"{len(data.first)} pairs"
    return f"{len(data.test_texts)} texts, {len(data.train_texts)} for the probe"
