"""filter keeps what its rules say, keeps scores in step with texts, and refuses scores that do not fit."""

import json
from contextlib import nullcontext

import numpy as np
import pytest

from gritlm.curation.filter import main
from gritlm.curation.rules import RowRules, RowScores
from gritlm.curation.scores_file import PairScores
from gritlm.errors import UserError

ROWS = [  # query, positives, negatives, their scores
    ("clean", {"a": 0.9}, {"b": 0.2, "c": 0.3}),
    ("false negative", {"d": 0.8}, {"e": 0.85, "f": 0.1}),
    ("all false", {"g": 0.5}, {"h": 0.6, "i": 0.7}),
    ("wrong positive", {"j": 0.1}, {"k": 0.0}),
    ("two positives", {"l": 0.9, "m": 0.4}, {"n": 0.3}),
    ("none", {"o": 0.7}, {}),
]
REMOVED = {"false negative": ["f"], "all false": []}


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    """Rows with another key, and scores as mine writes them."""
    path = tmp_path / "set.jsonl"
    rows = [
        {
            "query": ["Find: ", query],
            "pos": [*positives],
            "neg": [*negatives],
            "id": number,
            "scores": {"pos": [*positives.values()], "neg": [*negatives.values()]},
        }
        for number, (query, positives, negatives) in enumerate(ROWS)
    ]
    write(path, rows)
    return path


def go(data, *more, scores=None) -> dict[str, dict]:
    out = data.parent / f"out{len(list(data.parent.iterdir()))}"
    main([*map(str, (data, out, "--scores", scores or data, "--data_cache", data.parent / "cache", *more))])
    rows = map(json.loads, (out / "set.jsonl").read_text().splitlines())
    return {row["query"][1]: row for row in rows}


@pytest.mark.parametrize(
    ("flags", "dropped", "negatives"),
    [
        ((), set(), REMOVED),
        (("--relative_margin", "none"), set(), {}),
        (("--relative_margin", 0.7), set(), {"clean": ["b"], **REMOVED, "two positives": []}),
        (("--false_negatives", "keep"), set(), {}),
        (("--max_false_negatives", 0.5), {"all false"}, {"false negative": ["f"]}),
        (("--max_false_negatives", 0), {"all false", "false negative"}, {}),
        (("--min_positive", 0.4), {"wrong positive"}, REMOVED),
        (("--min_positive", 0.41), {"wrong positive", "two positives"}, REMOVED),
        (("--min_margin", 0.15), {"wrong positive", "two positives"}, REMOVED),
        (("--min_margin", 0, "--false_negatives", "keep"), {"false negative", "all false"}, {}),
        (("--max_samples", 2), {q for q, *_ in ROWS} - {"clean", "false negative"}, {"false negative": ["f"]}),
        (
            ("--max_samples", 3, "--sort_by", "margin"),  # a row without negatives has the best margin
            {q for q, *_ in ROWS} - {"none", "all false", "false negative"},
            REMOVED,
        ),
    ],
)  # fmt: skip
def test_each_rule_drops_what_it_says(data, capsys, flags, dropped, negatives):
    kept = go(data, *flags)
    assert {q for q, *_ in ROWS} - kept.keys() == dropped
    for query, _, own in ROWS:
        if query in kept:
            row = kept[query]
            assert row["neg"] == negatives.get(query, [*own])
            assert row["scores"]["neg"] == [own[text] for text in row["neg"]]
            assert row["id"] == [q for q, *_ in ROWS].index(query)
    (log,) = data.parent.glob("out*/set.dropped.tsv")
    assert len(log.read_text().splitlines()) == len(dropped)
    printed = capsys.readouterr().out
    assert f"kept {len(kept)} of 6 rows" in printed and "positive scores of rows that stay |" in printed


def test_suspected_negatives_become_positives(data):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row |= {"pos_scores": row["scores"]["pos"], "neg_scores": row["scores"]["neg"]}
    write(data, rows)
    kept = go(data, "--false_negatives", "relabel")
    row = kept["all false"]
    assert (row["pos"], row["neg"]) == (["g", "h", "i"], [])
    for of in (row["scores"], {"pos": row["pos_scores"], "neg": row["neg_scores"]}):
        assert of == {"pos": [0.5, 0.6, 0.7], "neg": []}
    assert kept["clean"]["pos"] == ["a"]


def test_scores_out_of_step_are_named(data):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0] |= {"neg_scores": [1.0]}  # of two
    write(data, rows)
    assert go(data)["clean"]["neg_scores"] == []
    (log,) = data.parent.glob("out*/set.dropped.tsv")
    assert "set.jsonl:1\tscores removed; neg_scores emptied: found 1 for 2 negatives" in log.read_text()


def test_scores_of_pairs_in_any_order(data, tmp_path):
    pairs = [
        {"query": query, "passage": text, "score": score}
        for query, *sides in ROWS
        for side in sides
        for text, score in side.items()
    ]
    scores = tmp_path / "pairs.jsonl"
    write(scores, pairs[::-1])
    assert go(data, scores=scores) == go(data)
    pairs[1]["score"] = 0.95
    write(scores, pairs)
    assert go(data, scores=scores)["clean"]["neg"] == ["c"] != go(data)["clean"]["neg"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "clean", "passage": "a", "score": True}, r"scores\.jsonl:1: passage: found the score True, wanted"),
        ({"query": "clean", "passage": "a", "score": "5"}, "found the score '5', wanted a finite number"),
        ({"query": "clean", "passage": 3, "score": 1}, "passage: found 'clean' and '3', wanted text"),
        ({"query": "clean", "pos": ["a"], "neg": []}, "pos: found no scores of it, wanted"),
        ({"pos": ["a"], "neg": []}, "found no query, wanted"),
        ({"query": "q", "pos": ["a", "b"], "neg": [], "pos_scores": [1]}, "pos: found 1 scores of 2 passages"),
        ({"query": "clean", "passage": "a", "score": 1}, r"no score of \S*set\.jsonl:1: neg\[0\] \('clean' and 'b'\)"),
        ({"query": "clean", "passage": "b", "score": 1}, r"no score of \S*set\.jsonl:1: pos\[0\]"),
        ({"query": "clean", "passage": "a", "score": None}, r"no score of \S*set\.jsonl:1: pos\[0\]"),
    ],
)
def test_scores_that_do_not_fit_are_refused(data, tmp_path, row, message):
    scores = tmp_path / "scores.jsonl"
    write(scores, [row])
    with pytest.raises(UserError, match=message) as error:
        go(data, scores=scores)
    assert "\n" not in str(error.value)
    write(scores, [{"query": "clean", "passage": "a", "score": score} for score in (1, 1, 2)])
    with pytest.raises(UserError, match=r"scores\.jsonl:3: found the score 2\.0, before 1\.0, wanted one"):
        go(data, scores=scores)


def test_scores_of_a_pair_that_differ_by_rounding_are_one_score(tmp_path):
    scores = tmp_path / "scores.jsonl"
    for second, fits in ((0.7743693590164185, True), (0.7754, False)):
        write(scores, [{"query": "q", "passage": "a", "score": score} for score in (0.7743694186210632, second)])
        with nullcontext() if fits else pytest.raises(UserError, match="wanted one"):
            PairScores(str(scores))


def test_bad_flags_give_one_line(data, capsys):
    for flags, message in (
        (("--max_rank", 3), "--max_rank, --corpus: found no --model"),
        (("--max_samples", 0), "--max_samples 0: wanted 1 or more"),
        (("--min_margin", "nan"), "argument --min_margin: found 'nan', wanted a number"),
        (("--max_false_negatives", 1.5), "wanted a share from 0 to below 1"),
        (("--relative_margin", "none", "--max_false_negatives", 0.5), "--relative_margin none: found a rule"),
        (("--relative_margin", 95), "argument --relative_margin: found 95, wanted a share below 1"),
        (("--relative_margin", "high"), "argument --relative_margin: found 'high', wanted a number"),
        (("--processes", 0), "--processes 0: wanted 1 or more"),
        (("--min_positive", 2), "set: found no row that all rules keep"),
    ):
        with pytest.raises(UserError, match=message):
            go(data, *flags)
    assert "positive scores of rows dropped by a rule |" in capsys.readouterr().out
    with pytest.raises(UserError, match="neither --model nor --scores"):
        main([str(data), str(data.parent / "no")])


def test_a_label_stops_the_run_and_files_left_out_are_named(tmp_path, capsys):
    folder, scores = tmp_path / "data", tmp_path / "scores.jsonl"
    folder.mkdir()
    row = {"query": "q", "pos": ["a"], "neg": ["b"], "scores": {"pos": [0.9], "neg": [0.1]}, "id": 1}
    for path in (scores, folder / "test.jsonl"):
        write(path, [row])
    write(folder / "set.jsonl", [row | {"label": 0}])
    arguments = [*map(str, (folder, tmp_path / "out", "--scores", scores, "--data_cache", tmp_path / "cache"))]
    with pytest.raises(UserError, match=r"set: found the key 'label' in 1 rows.*--ignore_columns label takes"):
        main(arguments)
    assert "test splits left out (name a file itself to train on it): test.jsonl" in capsys.readouterr().out
    main([*arguments, "--ignore_columns", "label"])
    assert "set: keys that are not read, but kept: 'id' (1 rows), 'label' (1 rows)" in capsys.readouterr().out


def test_several_sets_give_lists_for_an_ablation(data, tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_bytes(data.read_bytes())
    main([*map(str, (folder, tmp_path / "out", "--scores", folder, "--data_cache", tmp_path / "cache"))])
    assert json.loads((tmp_path / "out/without-one.json").read_text()) == {"one": 0}
    before = (tmp_path / "out/one.jsonl").read_bytes()
    (tmp_path / "out/two.jsonl").unlink()
    main([*map(str, (folder, tmp_path / "out", "--scores", folder, "--data_cache", tmp_path / "cache"))])
    assert (tmp_path / "out/two.jsonl").read_bytes() == before == (tmp_path / "out/one.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"was made by filter with min_positive None, now 0\.1"):
        main([*map(str, (folder, tmp_path / "out", "--scores", folder, "--min_positive", 0.1))])


def test_margins_of_negative_scores():
    """Logits of a cross-encoder: the margin is a share of the size, below the score."""
    rules = RowRules(0.1, "remove", None, None, None, None)
    verdict = rules.judge(RowScores(np.array([-2.0]), np.array([-2.1, -2.3, -1.0])))
    assert verdict.suspected == [0, 2] and verdict.kept == [1]
    assert verdict.margin == pytest.approx(0.3)
