"""The file of --num_samples: rows, lengths and losses of single data sets, in the plan, the batch and the loss."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import make_builder
from test_objective import QUERIES, TEMPERATURE, batch, vectors  # noqa: F401

from gritlm.errors import UserError
from gritlm.training.arguments import DataArguments, ObjectiveArguments
from gritlm.training.objective import Objective
from gritlm.training.set_settings import lengths_of, objectives_of, read_set_settings, rows_of


def settings_of(tmp_path, text: str):
    (tmp_path / "n.json").write_text(text)
    return read_set_settings(str(tmp_path / "n.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "found list"),
        ("{", "no JSON"),
        ('{"a": "many"}', "a: rows: found 'many', wanted a number of rows"),
        ('{"a": -1}', "a: rows: found -1"),
        ('{"a": {"temprature": 1}}', "a: found the key 'temprature', wanted some of rows, "),
        ('{"a": {"in_batch_negatives": 0}}', "a: in_batch_negatives: found 0, wanted true or false"),
        ('{"a": {"temperature": true}}', "a: temperature: found True, wanted a number"),
        ('{"a": {"negatives_cross_device": false}}', "a: found the key 'negatives_cross_device'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        settings_of(tmp_path, text)
    with pytest.raises(UserError, match="No such file"):
        read_set_settings(str(tmp_path / "absent"))


def test_both_forms_are_read(tmp_path):
    settings_of(tmp_path, '{"a": 5, "b": {"temperature": 0.1, "query_max_len": 16}}')
    data = DataArguments(num_samples=str(tmp_path / "n.json"), query_max_len=32, passage_max_len=48)
    run = SimpleNamespace(data=data, objective=ObjectiveArguments())
    assert rows_of(run) == {"a": 5}
    with pytest.raises(UserError, match="--num_samples: found data set 'b', wanted some of a, c"):
        objectives_of(run, ["a", "c"])
    assert {name: args.temperature for name, args in objectives_of(run, ["a", "b"]).items()} == {"a": 0.02, "b": 0.1}
    assert lengths_of(run, ["a", "b"]) == {"a": (32, 48), "b": (16, 48)}
    data.query_max_len = 8
    with pytest.raises(UserError, match="b: query_max_len: found 16, wanted at most --query_max_len 8"):
        lengths_of(run, ["a", "b"])


def test_each_row_of_a_mixed_batch_has_its_own_sets_loss(vectors):  # noqa: F811
    """Rows 0 to 3 are of set 0, the others of set 1."""
    flags = [ObjectiveArguments(TEMPERATURE), ObjectiveArguments(0.2, same_tower=True)]
    where = batch()
    alone = [sum(Objective(args)(vectors, where).values()) for args in flags]
    where.set_B, where.sets = torch.tensor([0] * 4 + [1] * 4), (0, 1)
    mixed = Objective(flags[0], by_set=flags)(vectors, where)
    assert mixed.keys() == {"info_nce", "same_tower"}
    where.set_B = torch.zeros(QUERIES, dtype=torch.long)
    assert torch.allclose(sum(Objective(flags[0], by_set=flags)(vectors, where).values()), alone[0])
    where.set_B = torch.ones(QUERIES, dtype=torch.long)
    assert torch.allclose(sum(Objective(flags[0], by_set=flags)(vectors, where).values()), alone[1])
    where.set_B = torch.tensor([1] * 4 + [0] * 4)
    other = Objective(flags[0], by_set=flags)(vectors, where)
    whole = sum(mixed.values()) + sum(other.values())
    assert torch.allclose(whole, sum(alone)), "each row once under each loss"


def test_a_teachers_scores_in_a_mixed_batch(vectors):  # noqa: F811
    """Of each query with its own set's weight: not the mean over the batch times the share of the set."""
    plain = ObjectiveArguments(TEMPERATURE, teacher_loss="scores")
    taught, where, found = dataclasses.replace(plain, teacher_weight=1.0), batch(), []
    whole = Objective(taught)(vectors, where)["teacher"]
    for sets in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4):
        where.set_B, where.sets = torch.tensor(sets), (0, 1)
        found.append(Objective(plain, by_set=[taught, plain])(vectors, where)["teacher"])
    assert torch.allclose(sum(found), whole)
    assert not torch.allclose(found[0], whole / 2, rtol=1e-3), "control: the halves differ"


def test_a_batch_says_whose_rows_it_holds_and_cuts_them_to_their_length(qwen3, data, tmp_path):
    builder = make_builder(qwen3, data, tmp_path, batch=8)
    names = [record_set.name for record_set in builder.records]
    builder.lengths = [(32, 48) if name != names[0] else (8, 12) for name in names]
    longest_of: dict[bool, int] = {}
    for step in range(builder.plan.steps_per_epoch):
        built, planned = builder[0, step], builder.plan.batch(0, step)
        assert built.contrastive.set_B.tolist() == [dataset for dataset, _ in planned.rows]
        assert set(built.contrastive.set_B.tolist()) <= set(built.contrastive.sets)
        longest = max(int(chunk["lengths"].max()) for chunk in built.chunks)
        short = planned.dataset == names[0]
        longest_of[short] = max(longest, longest_of.get(short, 0))
    assert longest_of[True] <= 12 < longest_of[False], "the other sets are the control"
