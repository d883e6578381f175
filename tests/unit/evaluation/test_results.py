"""Results are strict JSON, whole or absent, and the table shows them side by side."""

import json

import numpy as np
import pytest

from gritlm.errors import UserError
from gritlm.evaluation.results import read_kept, read_results, result_path, table, write_results
from gritlm.evaluation.sets import SetResult, StsSet
from gritlm.strict_json import parse_json


def result(name: str, value: float, kind: str = "retrieval", main: str = "ndcg@10", **space) -> SetResult:
    return SetResult(name, kind, main, {main: value, "recall@10": value / 2}, ["a", "b"], [value, value], space=space)


def test_what_is_written_is_read(tmp_path):
    wanted = [result("a", 0.5, alignment=np.float32(0.25), histogram=np.arange(3)), result("b", 0.25)]
    path = tmp_path / "new" / "r.json"
    write_results(path, wanted, {"model": "m", "anisotropy": float("nan")})
    found = read_results(path)
    wanted[0].space = {"alignment": 0.25, "histogram": [0, 1, 2]}
    assert found.sets == wanted
    assert found.about["model"] == "m" and found.about["anisotropy"] is None
    assert {"date", "versions"} <= found.about.keys() and "torch" in found.about["versions"]
    parse_json(path.read_text())  # refuses NaN
    with pytest.raises(ValueError, match="NaN"):
        parse_json(json.dumps({"a": float("nan")}))  # control
    with pytest.raises(TypeError):
        write_results(path, wanted, {"model": object()})
    assert read_results(path).sets == wanted, "an earlier file outlives a failed write"
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


def test_a_file_that_is_no_result_gives_one_line(tmp_path):
    path = tmp_path / "r.json"
    for text, message in (
        (None, "No such file"),
        ("{", "no JSON"),
        ("[1]", "found list, wanted results of gritlm evaluate"),
        ('{"format": 9}', "found the format 9, wanted 1"),
        ('{"format": 1, "about": {}, "sets": [{"name": "a"}]}', "found no results of gritlm evaluate"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match=message) as error:
            read_results(path)
        assert "\n" not in str(error.value)


def test_a_kept_result_is_that_of_one_model_on_one_set(tmp_path, capsys):
    data, other = (StsSet("s/t s", ["a", "b"], ["c", last], [0.0, 1.0]) for last in "de")
    path, identity = result_path(tmp_path, "x/run", {"files": "1"}, data)
    assert path.parent == tmp_path / "run" and path.name.startswith("s_t_s-")
    others = [result_path(tmp_path, "x/run", {"files": "2"}, data), result_path(tmp_path, "run", {"files": "1"}, other)]
    assert path not in [place for place, _ in others]
    assert read_kept(path, identity) is None
    write_results(path, [result("a", 0.5)], {"identity": identity})
    assert read_kept(path, identity).sets == [result("a", 0.5)]
    assert read_kept(path, others[0][1]) is None
    path.write_text(path.read_text()[:-20])
    assert read_kept(path, identity) is None and "no JSON" in capsys.readouterr().out


def test_the_table(tmp_path):
    one = {"a": result("a", 0.5, effective_rank_passages=12.34), "b": result("b", 0.25)}
    two = {"a": result("a", 0.125), "sts": result("sts", -0.5, "sts", "spearman")}
    assert table({"one": one}, {"b"}) == [
        "retrieval  nDCG@10  recall@10",
        "a           0.5000     0.2500",
        "b*          0.2500     0.1250",
        "mean of 2   0.3750     0.1875",
        "",
        "space  alignment  uniformity  effective rank  anisotropy  false negatives?",
        "a              -           -            12.3           -                 -",
        "",
    ]
    assert table({"one": one, "two": two}, set())[:9] == [
        "retrieval  model  nDCG@10  recall@10",
        "a          one     0.5000     0.2500",
        "a          two     0.1250     0.0625",
        "b          one     0.2500     0.1250",
        "",
        "sts  model  Spearman  recall@10",
        "sts  two     -0.5000    -0.2500",
        "",
        "space  model  alignment  uniformity  effective rank  anisotropy  false negatives?",
    ]
