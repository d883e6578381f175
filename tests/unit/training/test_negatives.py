"""What a run says of its negatives is what the masks leave, counted here again with a loop over texts."""

import json
import shutil

import pytest
from helpers import INSTRUCTION, train_flags, write_equal_after_the_cut, write_jsonl

from gritlm.data.batches import BatchBuilder
from gritlm.data.records import load_records
from gritlm.errors import UserError
from gritlm.models.chunks import ChunkConfig
from gritlm.training.flag_checks import parse
from gritlm.training.negatives import count_negatives, describe_negatives
from gritlm.training.setup import build_text_tokenizer, describe_steps, make_plan, slots, used_sets


@pytest.fixture
def run_of(qwen3, tmp_path):
    """`run_of({"set": rows}, flag=value)`: what `describe_negatives` takes, but for the ranks."""

    def make(sets, **more):
        folder = tmp_path / "data"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, rows in sets.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = parse(train_flags(qwen3, folder, tmp_path / "out", tmp_path / "cache", **more))
        records = load_records(folder, run.data.data_cache)
        return make_plan(run, records), run, records, build_text_tokenizer(run, records)

    return make


def say(made, ranks: int = 1) -> tuple[list[str], list[str]]:
    plan, run, records, text_tokenizer = made
    return describe_negatives(plan, run, records, ranks, text_tokenizer)


def rows(count: int, query="question {}", positive="answer {}", negatives=()) -> list[dict]:
    """Rows with their number in the texts."""
    return [
        {"query": query.format(n), "pos": [positive.format(n)], "neg": [text.format(n) for text in negatives]}
        for n in range(count)
    ]


LONG = "river stone engine " * 30
SAME_QUERY, SAME_POSITIVE = rows(24, query="what is the topic"), rows(24, positive="a label")
NOTHING = {
    "one query": (SAME_QUERY, {}, "8 queries of a batch, 1 of them different, and 8 different positives)"),
    "one query, same tower": (SAME_QUERY, {"same_tower": True}, "1 of them different"),
    "one positive": (SAME_POSITIVE, {}, "8 of them different, and 1 different positives)"),
    "queries that the cut makes equal": (
        rows(24, query=LONG + "{}"),
        {},
        "--query_max_len 32 makes 21 of 24 queries looked at equal",
    ),
    "positives that the cut makes equal": (
        rows(24, positive=LONG + "{}"),
        {},
        "--passage_max_len 48 makes 21 of 24 positives looked at equal",
    ),
    "the batch is one query": (rows(24), {"global_batch_size": 1}, "a larger --global_batch_size"),
    "the group is the positive": (
        rows(24, negatives=["wrong {}"]),
        {"global_batch_size": 1, "train_group_size": 1},
        "or --train_group_size",
    ),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_contrast_is_refused(run_of, name):
    data, flags, message = NOTHING[name]
    with pytest.raises(UserError, match="found nothing to contrast: 24 of 24 queries") as error:
        say(run_of({"d": data}, **flags))
    assert message in str(error.value)


def test_a_rank_that_sees_one_query_needs_others_or_hard_negatives(run_of):
    plain, hard = {"d": rows(24)}, {"d": rows(24, negatives=["wrong {}"])}
    with pytest.raises(UserError, match="found nothing to contrast"):
        say(run_of(plain, negatives_cross_device=False), ranks=8)
    assert "7 from other ranks" in say(run_of(plain), ranks=8)[0][0]
    assert (
        "1 hard (--train_group_size 3 asks for 2), 0 in-batch, 0 from"
        in say(run_of(hard, negatives_cross_device=False), ranks=8)[0][0]
    )


def test_a_data_set_with_nothing_to_contrast_is_named(run_of):
    sets = {"good": rows(24), "bad": SAME_QUERY, "copies": rows(24, query="text {}", positive="text {}")}
    _, warnings = say(run_of(sets))
    assert sorted(warnings) == [
        "bad: 24 of 24 queries looked at see no negative (found 8 queries of a batch, 1 of them different, and 8 "
        "different positives); the loss of such a query is 0",
        "copies: 24 of 24 queries looked at are equal to their positive",
    ]
    half = [row if number % 2 else row | {"neg": []} for number, row in enumerate(rows(24, negatives=["wrong {}"]))]
    (line,), (warning,) = say(run_of({"good": half}, global_batch_size=1))
    assert "each query sees 0.5 negatives: 0.5 hard (--train_group_size 3 asks for 2), 0 in-batch" in line
    assert warning.startswith("good: 12 of 24 queries looked at see no negative")


def test_texts_that_the_cut_makes_equal_are_named(run_of):
    mixed = [*rows(12, query=LONG + "{}"), *rows(12, query="other {}", positive="more {}")]
    _, (warning,) = say(run_of({"d": mixed}))
    assert warning.startswith("d: --query_max_len 32 makes ")
    assert warning.endswith(" of 24 queries looked at equal to another of their batch: they count as one text")
    assert say(run_of({"d": rows(24, query=f"{INSTRUCTION}{{}}")}))[1] == [], "control: they differ"


def test_each_data_set_has_its_own_lengths_and_loss(run_of, tmp_path):
    file, sets = tmp_path / "n.json", {"a": rows(24, query=LONG[:60] + "{}"), "b": rows(24)}
    for settings, doubtful in (({"a": {"query_max_len": 8}}, True), ({}, False)):
        file.write_text(json.dumps(settings))
        _lines, warnings = say(run_of(sets, num_samples=file))
        assert any(line.startswith("a: 24 of 24 queries looked at see no") for line in warnings) == doubtful, warnings
    pairs = {"contrastive_weight": 0, "cosent_weight": 1}
    for settings, looked_at in (({"a": pairs}, {"b"}), ({"a": pairs, "b": pairs}, set()), ({}, {"a", "b"})):
        file.write_text(json.dumps(settings))
        plan, run, records, text_tokenizer = made = run_of(sets, num_samples=file)
        assert count_negatives(plan, run, records, 1, text_tokenizer).keys() == looked_at
        assert bool(say(made)[0]) == bool(looked_at)


# ---- the count


def counted_again(made, after_the_cut: bool = True) -> tuple[int, int, int]:
    """Hard negatives, passages of other rows, and queries without any, from the texts of whole batches."""
    plan, run, records, text_tokenizer = made
    builder = BatchBuilder(plan, records, text_tokenizer, slots(run.data, records)[0], ChunkConfig(10**6))
    hard = others = without = 0
    for step in range(plan.steps_per_epoch):
        batch = []  # the query's tokens, its known positives, and of each passage the whole text's id and the tokens
        for dataset, row in plan.batch(0, step).rows:
            record = records[dataset][row]
            texts, ids, _ = builder._draw(0, step, dataset, row, record)
            (query,) = text_tokenizer([record.query], run.data.query_max_len)
            tokens = [tuple(text.ids) for text in text_tokenizer(texts, run.data.passage_max_len)]
            batch.append((query.ids, record.known_positives, list(zip(ids, tokens, strict=True))))
        for number, (query, known, _) in enumerate(batch):
            positives = {passages[0][1] for other, _, passages in batch if other == query and after_the_cut}
            left = [sum(i not in known and t not in positives for i, t in passages) for _, _, passages in batch]
            hard += left[number]
            others += sum(left) - left[number]
            without += not any(left)
    return hard, others, without


@pytest.mark.parametrize("kind", ["repeated texts", "equal after the cut"])
def test_the_count_is_what_the_masks_leave(run_of, tmp_path, kind):
    file = tmp_path / "rows.jsonl"
    write_equal_after_the_cut(file) if kind == "equal after the cut" else write_jsonl(file, 24, 3, seed=1)
    plan, run, records, text_tokenizer = made = run_of(
        {"d": [json.loads(line) for line in file.read_text().splitlines()]}
    )
    found = count_negatives(plan, run, records, 1, text_tokenizer)["d"]
    assert (found.hard, found.others, found.without) == counted_again(made)
    assert (found.queries, found.batches) == (24, 3)
    if kind == "equal after the cut":
        assert found.others < counted_again(made, after_the_cut=False)[1], "control: whole texts are compared"
    halves = count_negatives(plan, run, records, 2, text_tokenizer)["d"]
    assert halves == found, "the ranks see one batch"
    run.objective.negatives_cross_device = False
    assert count_negatives(plan, run, records, 2, text_tokenizer)["d"].queries == 12, "the first rank's queries"


def test_the_numbers_of_ranks_and_of_same_tower(run_of):
    data = {"d": rows(24, negatives=["wrong {}", "bad {}", "poor {}"])}
    (line,), _ = say(run_of(data, train_group_size=4), ranks=2)
    assert line == (
        "  each query sees 31 negatives: 3 hard, 12 in-batch, 16 from other ranks (mean of 24 queries of 3 batches)"
    )
    (line, more), _ = say(run_of(data, negatives_cross_device=False, same_tower=True), ranks=2)
    assert line.startswith("  each query sees 11 negatives: 2 hard, 9 in-batch, 0 from other ranks (")
    assert more == "  --same_tower adds 3 queries, and to its positive 9 passages"


def test_a_data_set_that_is_not_used_gives_no_prompt_and_no_example(run_of, tmp_path):
    file = tmp_path / "n.json"
    file.write_text('{"big": 0}')
    sets = {"big": rows(30, query="{}"), "small": rows(24)}
    for given, names in (({"num_samples": file}, {"small"}), ({}, {"big", "small"})):
        plan, _, records, _ = run_of(sets, **given)
        assert {record_set.name for record_set in used_sets(plan, records)} == names


# ---- the steps


def test_few_steps_name_a_batch_that_gives_more(run_of):
    plan, run, *_ = run_of({"d": rows(3000)}, global_batch_size=2048, max_steps=-1)
    assert describe_steps(plan, run, 1) == ("  1 step in all: a smaller --global_batch_size gives more (256: 11 steps)")
    assert describe_steps(plan, run, 96).endswith("(192: 15 steps)"), "a multiple of the ranks"
    plan, run, *_ = run_of({"d": rows(3000)}, global_batch_size=256, max_steps=-1)
    assert describe_steps(plan, run, 1) == "  11 steps in all"
    plan, run, *_ = run_of({"d": rows(3000)}, global_batch_size=2048, max_steps=3)
    assert describe_steps(plan, run, 1) == "  3 steps in all (--max_steps), 3.00 epochs"
    with pytest.raises(UserError, match="--global_batch_size 4096 is larger than the data: found 3000 rows; lower it"):
        run_of({"d": rows(3000)}, global_batch_size=4096)
