"""The table of a study, its tests of difference and equivalence, and the parts that scripts/study.sh does once."""

import json
import math
import os
import subprocess

import numpy as np
import pytest
from helpers import ROOT
from launcher import program
from scipy import stats

from gritlm.analysis.equivalence import paired_test
from gritlm.analysis.study import COLUMNS, main
from gritlm.errors import UserError
from gritlm.evaluation.results import write_results
from gritlm.evaluation.sets import SetResult
from gritlm.strict_json import parse_json

# ---- the tests


def test_difference_and_equivalence_are_the_t_tests_of_scipy():
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 30):
        base, tuned = rng.normal(50, 1, count), rng.normal(50.2, 1, count)
        difference, margin = tuned - base, 0.7
        found = paired_test(difference.tolist(), margin)
        paired = stats.ttest_rel(tuned, base)
        assert found.p_difference == pytest.approx(paired.pvalue, rel=1e-9)
        assert (found.low, found.high) == pytest.approx(tuple(paired.confidence_interval(0.95)), rel=1e-9)
        sides = ((-margin, "greater"), (margin, "less"))
        one_sided = [stats.ttest_1samp(difference, place, alternative=side).pvalue for place, side in sides]
        assert found.p_equivalent == pytest.approx(max(one_sided), rel=1e-9)
        assert found.p_equivalent != pytest.approx(min(one_sided), rel=1e-3), "control: the other side"


def test_equivalent_where_the_90_percent_interval_lies_within_the_margin():
    values = [0.1, 0.3, -0.2]
    mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(3)
    reach = 2.919985580355516 * error  # the 95% point of Student's t with 2 degrees of freedom, from a table
    assert paired_test(values, 1.0).smallest_margin == pytest.approx(reach, rel=1e-9)
    for margin, expected in ((abs(mean) + reach * 1.001, "equivalent"), (abs(mean) + reach * 0.999, "undecided")):
        assert paired_test(values, margin).outcome == expected
    centred = (np.array(values) - mean).tolist()
    assert [paired_test(centred, reach * scale).outcome for scale in (1.001, 0.999)] == ["equivalent", "undecided"]


def test_no_more_than_five_percent_are_wrongly_called_equivalent():
    """At a true difference of the margin. Control: to read "no significant difference" as equivalence is far worse."""
    rng, margin, wrong, naive = np.random.default_rng(1), 1.0, 0, 0
    for values in rng.normal(margin, 0.5, (1000, 3)):
        found = paired_test(values.tolist(), margin)
        wrong += found.p_equivalent < 0.05
        naive += found.p_difference >= 0.05
    assert wrong / 1000 == pytest.approx(0.05, abs=0.02)
    assert naive / 1000 > 0.2


def test_one_seed_equal_differences_and_what_is_refused():
    one = paired_test([0.2], 0.5)
    assert (one.low, one.p_difference, one.smallest_margin, one.outcome) == (None, None, None, "one seed, no test")
    assert paired_test([0.0, 0.0], 0.5).outcome == "equivalent"
    assert paired_test([0.2, 0.2], 0.5).outcome == "higher, equivalent"
    assert paired_test([-2.0, -2.0], 0.5).outcome == "lower"
    assert paired_test([0.2, 2.0], 0.5).outcome == "undecided", "control"
    for values, margin in (([], 0.5), ([math.nan, 0.1], 0.5), ([0.1, 0.2], 0.0), ([0.1, 0.2], math.nan)):
        with pytest.raises(ValueError, match="wanted finite numbers and a margin above 0"):
            paired_test(values, margin)


# ---- the table

SCORES = {  # run -> task -> nDCG@10
    **{f"base-{seed}": {"a": 0.50 + seed / 100, "b": 0.30} for seed in (1, 2, 3)},
    **{f"far-{seed}": {"a": 0.40 + seed / 100, "b": 0.20 + seed / 1000} for seed in (1, 2, 3)},
}


def write_run(folder, run: str, scores: dict, **flags) -> None:
    path = folder / "runs" / run / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    model, seed = run.rsplit("-", 1)
    settings = {"model_name_or_path": model, "seed": int(seed), "learning_rate": 2e-5} | flags
    path.write_text(json.dumps({"finished": True, "flags": settings}))
    for task, score in scores.items():
        result = SetResult(task, "retrieval", "ndcg@10", {"recall@10": 0.9, "ndcg@10": score}, ["q"], [score])
        write_results(folder / "evaluation" / run / "own" / run / f"{task}-0.json", [result], {"model": {"name": run}})


@pytest.fixture
def study(tmp_path):
    for run, scores in SCORES.items():
        write_run(tmp_path, run, scores)
    for when, value in (("before", 0.95), ("after", 0.9)):
        layers = [{"layer": 0, "value": 0.1}, {"layer": 1, "value": value, "low": 0.8, "high": 0.97}]
        layers += [{"layer": "pooled", "value": 0.2}]
        path = tmp_path / "hrsa" / "far" / when / "metrics" / "h_inv.json"
        path.parent.mkdir(parents=True)
        found = {"pair": {"layers": layers}, "ceiling": {"layers": layers[:1]}}
        path.write_text(json.dumps({"level": "representation", "comparisons": found}))
    return tmp_path


def table(folder, *more: str, seeds=("1", "2", "3")) -> dict:
    pair = ["--pair", "far", "base", "far", "--benchmark", "own", "data/own"]
    assert main([str(folder), *pair, "--seeds", *seeds, *more]) == 0
    return parse_json((folder / "table.json").read_text())


def test_the_table_has_differences_by_seed_and_both_tests(study, capsys):
    mean, *tasks = table(study)["scores"]
    assert (mean["task"], mean["tasks"], [row["task"] for row in tasks]) == ("Mean(Task)", 2, ["a", "b"])
    assert mean["base"] == pytest.approx([40.5, 41, 41.5]) and mean["reasoning"] == pytest.approx([30.55, 31.1, 31.65])
    expected = stats.ttest_rel(mean["reasoning"], mean["base"])
    assert mean["p_difference"] == pytest.approx(expected.pvalue) and mean["outcome"] == "lower"
    assert (mean["low"], mean["high"]) == pytest.approx(tuple(expected.confidence_interval()))
    raw = stats.ttest_1samp([-9.9, -9.8, -9.7], 0).pvalue  # of b; the differences of a are all equal
    assert [row["p_difference"] for row in tasks] == pytest.approx([0, raw], abs=1e-12)
    markdown = (study / "table.md").read_text()
    assert "| far | data/own | Mean(Task) of 2 | 41.00 ± 0.50 | 31.10 ± 0.55 | -9.90 [-10.02, -9.78] |" in markdown
    assert "| far | h_inv | 0.950 [0.800, 0.970] | 0.900 [0.800, 0.970] | 0.100 | - |" in markdown
    assert f"| {' | '.join(COLUMNS)} |" in markdown and markdown in capsys.readouterr().out
    header, *lines = [line.split("\t") for line in (study / "table.tsv").read_text().splitlines()]
    assert [dict(zip(header, line, strict=True))["mean"] for line in lines] == [str(r["mean"]) for r in [mean, *tasks]]


def test_the_margin_decides_and_one_seed_has_no_interval(study):
    outcomes = [table(study, "--equivalence_margin", m)["scores"][0]["outcome"] for m in ("0.5", "20")]
    assert outcomes == ["lower", "lower, equivalent"]
    assert "less than 20 points (--equivalence_margin)" in (study / "table.md").read_text()
    row = table(study, seeds=("1",))["scores"][0]
    assert (row["low"], row["outcome"]) == (None, "one seed, no test")
    markdown = (study / "table.md").read_text()
    assert "One seed: no interval and no test" in markdown and "| 40.50 | 30.55 | -9.95 | - | - |" in markdown


def test_the_table_of_mteb_tasks(study):
    for run, scores in SCORES.items():
        path = study / "evaluation" / run / "own" / "tables" / "x.json"
        path.parent.mkdir()
        model = {"name": run, "scores": {"m": scores["a"]}}
        path.write_text(json.dumps({"types": {"m": "STS"}, "models": [model]}))
    assert [row["task"] for row in table(study)["scores"]] == ["Mean(Task)", "m"]
    path.write_text(json.dumps({"types": {"m": "STS", "n": "STS"}, "models": [model]}))
    with pytest.raises(UserError, match=r"far-3/own: n: found the score None, wanted a number"):
        table(study)
    path.write_text('{"types": {"m": 1}, "models": []}')
    with pytest.raises(UserError, match=r"x\.json: found no table of gritlm evaluate in it"):
        table(study)


def test_what_is_wrong_is_one_line(study):
    def refused(message: str, *more: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            table(study, *more)
        assert "\n" not in str(error.value)

    for margin in ("0", "-1", "nan", "inf"):
        refused(r"--equivalence_margin: found .*, wanted points above 0", "--equivalence_margin", margin)
    refused("--seeds: found 1 1, wanted different seeds", "--seeds", "1", "1")
    refused(r"pair far: .*base-9/run.json: No such file", "--seeds", "1", "9")
    write_run(study, "far-2", {}, learning_rate=1e-4)
    refused(r"pair far: learning_rate: found 2e-05 in .*base-1 and 0.0001 in .*far-2, wanted one recipe")
    write_run(study, "far-2", {})
    run = study / "runs/far-3/run.json"
    run.write_text(run.read_text().replace("true", "false"))
    refused(r"far-3: found a run that is not finished")
    run.write_text("{")
    refused(r"far-3/run.json: no JSON")
    write_run(study, "far-3", {"c": 0.5})
    refused(r"data/own: found c in one of base-1 and far-3, wanted the same tasks in both")
    result = study / "evaluation/far-3/own/far-3/c-0.json"
    result.write_text(result.read_text().replace('"ndcg@10": 0.5', '"ndcg@10": null'))
    refused(r"far-3/own: c: found the score None, wanted a number")
    result.write_text(result.read_text()[:50])
    refused(r"c-0.json: no JSON")
    result.unlink()
    copy = study / "evaluation/far-3/own/far-3/a-1.json"
    copy.write_text((copy.parent / "a-0.json").read_text())
    refused(r"far-3/own: found 2 results of a, wanted one")
    for path in copy.parent.iterdir():
        path.unlink()
    refused(r"far-3/own: found no result of gritlm evaluate")
    write_run(study, "far-3", SCORES["far-3"])
    metric = study / "hrsa/far/after/metrics/h_inv.json"
    whole = metric.read_text()
    metric.write_text(whole[:40])
    refused(r"h_inv.json: damaged")
    metric.write_text(whole)
    table(study)  # control


# ---- scripts/study.sh, with a stand-in for Python that says how it is called

PYTHON = """#!/bin/bash
case "$*" in *check_python.py | "-m gritlm devices") exit 0 ;; esac
echo "$*" >>calls
words=("$@")
for ((i = 0; i < $#; i++)); do case ${words[i]} in --output_*) out=${words[i + 1]} ;; esac; done
case "$*" in
  *" plan "*) exit 0 ;;
  *node.py*) mkdir -p "$out"; echo "{\\"finished\\": $([ -f stop ] && echo false || echo true)}" >"$out/run.json" ;;
  *evaluate* | *hrsa*) [ ! -f broken ] || exit 1; mkdir -p "$out" ;;
esac"""
FILE = """OUTPUT_DIR=out TRAIN_DATA=rows SEEDS=(1 2) BENCHMARKS=(eval/own "B(x, v2)") HRSA_TEXTS=${TEXTS-rows}
PAIRS=(sft x/base "y/far one" rl x/base near)
"""


class Script:
    def __init__(self, folder):
        self.folder = folder
        program(folder / "python", PYTHON)
        (folder / "rows").touch()
        (folder / "study.sh").write_text(FILE)

    def __call__(self, *words: str, code: int = 0, **env) -> list[str]:
        """Run the script; what Python was asked for since then, or where an exit code is expected the error."""
        (self.folder / "calls").write_text("")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SUBMIT"))}
        kept |= {"PYTHON": str(self.folder / "python"), "GPUS": "none"} | env
        command = ["bash", str(ROOT / "scripts/study.sh"), *(words or ["study.sh"])]
        done = subprocess.run(command, cwd=self.folder, env=kept, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        self.out = done.stdout
        calls = [line for line in (self.folder / "calls").read_text().splitlines() if " plan " not in line]
        return done.stderr.splitlines() if code else calls


@pytest.fixture
def script(tmp_path) -> Script:
    return Script(tmp_path)


def test_parts_that_are_done_are_not_done_again(script):
    calls = script()
    assert [sum(word in line for line in calls) for word in ("node.py", "evaluate", " hrsa ")] == [6, 12, 4]
    assert "--model_name_or_path y/far one" in calls[1] and "--seed 1" in calls[1], "a seed of each model comes first"
    assert "-m gritlm evaluate out/runs/base-1 --benchmark eval/own --output_folder out/evaluation/base-1/own" in calls
    after = "-m gritlm hrsa out/runs/base-1 out/runs/near-1 --ceiling out/runs/base-2 --texts rows"
    assert f"{after} --output_dir out/hrsa/rl/after" in calls
    assert calls[-1].startswith("-m gritlm study-table out --pair sft base far_one --pair rl base near --benchmark own")
    assert script() == calls[-1:] and "done: train 6 of 6, evaluate 12 of 12, hrsa 4 of 4 parts" in script.out
    (script.folder / "out/hrsa/sft/before/.done").unlink()
    assert len(script()) == 2, "control"


def test_it_goes_on_after_a_stop_or_a_failure(script):
    (script.folder / "stop").touch()  # the first training is asked to stop, and saves
    assert script(code=75)[-1].startswith("study: error: runs/base-1 ended with exit code 75")
    (script.folder / "stop").unlink()
    (script.folder / "broken").touch()
    assert script(code=1)[-1].startswith("study: error: evaluation/base-1/own ended with exit code 1")
    assert "evaluation/base-1/own" in script.out and "runs/near-2" in script.out
    (script.folder / "broken").unlink()
    assert sum("node.py" in line for line in script()) == 0
    assert script("study.sh", "train", "5") == [], "one part"
    assert script("study.sh", "hrsa", TEXTS="") == [], "left out"


def test_what_the_script_refuses(script):
    script()
    cases = {
        "OUTPUT_DIR=": "OUTPUT_DIR is empty",
        "SEEDS=()": "SEEDS is empty",
        "PAIRS=(a b)": "PAIRS: found 2 words, wanted three for each pair",
        "PAIRS=(a x/m y/m)": "models of PAIRS: found m twice, wanted different last names",
        "PAIRS=(a b c a d e)": "names of PAIRS: found a twice",
        "PAIRS=(a m m)": "PAIRS: a: found one model, wanted two",
        "SEEDS=(1 2 1)": "SEEDS: found 1 twice",
        "BENCHMARKS=(x/own y/own/)": "BENCHMARKS: found own twice",
        "PAIRS=(a paper/qwen3-4b m)": "PAIRS: found the recipe paper/qwen3-4b, wanted the model that it names",
        "HRSA_TEXTS=absent": "HRSA_TEXTS=absent: no such file",
        "TRAIN_FLAGS=(--max_steps 9)": "out/runs/base-1: found it done with other settings",
        "EVAL_FLAGS=(--seed 9)": "out/evaluation/base-1/own: found it done with other settings",
        "BENCHMARKS=(eval/own/)": "out/evaluation/base-1/own: found it done with other settings",
    }
    for line, message in cases.items():
        (script.folder / "other.sh").write_text(f"{FILE}{line}\n")
        (error,) = script("other.sh", code=2)
        assert error.startswith("study: error: ") and message in error, line
    for words in (["absent.sh"], ["study.sh", "tain"], ["study.sh", "train", "6"], ["study.sh", "hrsa", "-1"]):
        assert len(script(*words, code=2)) == 1
    assert "SUBMIT=pbs" in script(code=2, SUBMIT="pbs")[0]
    os.utime(script.folder / "out/runs/near-1/.done")  # trained again
    assert "evaluation/near-1/own: found it older than out/runs/near-1" in script(code=2)[0]
    (script.folder / "other.sh").write_text(f"{FILE}SEEDS+=(3) EQUIVALENCE_MARGIN=1\n")
    assert "older" in script("other.sh", "evaluate", code=2)[0], "control: other seeds and margins are welcome"


def test_the_study_of_the_paper_has_the_models_of_its_recipes():
    words = "source scripts/studies/paper.sh; printf '%s\\n' $RECIPE ${#PAIRS[@]} \"${PAIRS[@]}\""
    recipe, count, *words = subprocess.check_output(["bash", "-c", words], cwd=ROOT, text=True).splitlines()
    models = {word for place, word in enumerate(words) if place % 3}
    recipes = [path.read_text() for path in (ROOT / "scripts/training/recipes/paper").glob("*.sh")]
    assert recipe == "paper" and int(count) == 15 and len(models) == len(recipes) == 10
    assert all(any(f":-{model}}}" in text for text in recipes) for model in models)
