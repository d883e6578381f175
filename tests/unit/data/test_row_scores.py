"""Scores beside the passages are read in step with them, and bad ones are named."""

import json
import math
import re

import pytest

from gritlm.data.records import load_records
from gritlm.errors import UserError
from gritlm.training.arguments import DataArguments, ObjectiveArguments
from gritlm.training.start_report import check_scores

ROW = {"query": "q", "pos": ["p1", "p2"], "neg": ["n1", "p2", "n2"]}


def load(tmp_path, *rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (records,) = load_records(tmp_path / "rows.jsonl", tmp_path / "cache")
    return records


@pytest.mark.parametrize(
    "scores",
    [
        {"pos_scores": [1, 0.5], "neg_scores": [0.25, 0.5, 0.125]},
        {"scores": {"pos": [1.0, 0.5], "neg": [0.25, 0.5, 0.125]}},
    ],
)
def test_a_dropped_negative_takes_its_score_along(tmp_path, scores):
    other = {"query": "q", "pos": ["n1"], "neg": []}  # so n1 is no negative of q either
    records = load(tmp_path, ROW | scores, other)
    assert records[0].positive_scores == [1.0, 0.5]
    assert [text.text for text in records[0].negatives] == ["n2"]
    assert records[0].negative_scores == [0.125]
    assert records[1].positive_scores is None
    assert records.scored_rows == (1, 0)
    assert records.fingerprint() != load(tmp_path, ROW, other).fingerprint()


def test_scores_may_be_missing(tmp_path):
    records = load(tmp_path, ROW | {"scores": {"pos": [], "neg": [None, None, 0.5]}}, ROW | {"pos_scores": []})
    assert all(map(math.isnan, records[0].positive_scores))
    assert math.isnan(records[0].negative_scores[0]) and records[0].negative_scores[1] == 0.5
    assert records[1].positive_scores is None


def test_the_score_of_a_pair(tmp_path):
    records = load(tmp_path, {"query": "a", "pos": ["b"], "neg": [], "score": 0.25})
    assert records[0].positive_scores == [0.25] and records.scored_rows == (1, 1)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"neg_scores": [0.1]}, r"rows\.jsonl:1: neg_scores: found a list of 1, wanted 3 scores"),
        ({"pos_scores": [0.1, "x"]}, r"pos_scores\[1\]: found 'x', wanted a number"),
        ({"pos_scores": [0.1, True]}, r"pos_scores\[1\]: found True, wanted a number"),
        ({"scores": [1, 2]}, r"scores: found \[1, 2\], wanted"),
        ({"scores": {"positive": [1, 2]}}, "scores: found .*, wanted"),
        ({"pos_scores": [10**400, 1]}, r"pos_scores\[0\]: found 1000"),
        ({"score": 1}, "score: found 2 positives and 3 negatives, wanted one positive"),
        ({"score": 1, "pos_scores": [1, 2]}, "found score beside pos_scores and neg_scores, wanted one kind"),
    ],
)
def test_bad_scores_are_named(tmp_path, scores, message):
    """Only a loss that reads scores refuses them."""
    records = load(tmp_path, ROW, ROW | scores)
    (found,) = records.score_errors
    assert re.search(message.replace(":1:", ":2:"), found)
    assert records[1].positive_scores is None and records.scored_rows == (0, 0)
    (warning,) = check_scores([ObjectiveArguments()], [records], DataArguments())
    assert warning == f"rows: scores of 1 rows that no loss can read, the first: {found}"
    with pytest.raises(UserError, match=r"--distill_weight: .*rows\.jsonl:2: "):
        check_scores([ObjectiveArguments(distill_weight=1.0)], [records], DataArguments())
