"""`gritlm hrsa` on tiny models: a whole request, a restart, and what is refused."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build_family
from helpers import words
from transformers import AutoModel

from gritlm.analysis import hrsa, metrics, page
from gritlm.analysis.hrsa import Study, parse, run
from gritlm.cli import run_verb

TIED = ("correlation", "h_inv", "sparsity")


def near(model: Path, folder: Path, size: float = 0.01) -> Path:
    """A model that stayed close to another."""
    shutil.copytree(model, folder)
    changed = AutoModel.from_pretrained(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in changed.parameters():
            weight += size * torch.randn_like(weight)
    changed.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, qwen3) -> Path:
    """Texts, a near model, and another one: an encoder with another tokenizer, width and number of layers."""
    folder, rng = tmp_path_factory.mktemp("hrsa"), random.Random(0)
    near(qwen3, folder / "near")
    near(qwen3, folder / "further", 0.05)
    build_family(folder / "bert", "bert", hidden_size=40, num_hidden_layers=3)
    rows = [{"text": words(rng, 6, 30), "kind": rng.choice("xy"), "length": rng.random()} for _ in range(80)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return folder


def flags(place: Path, a: Path, b: Path, out: str, *more: str) -> list[str]:
    return [
        str(a),
        str(b),
        "--texts",
        str(place / "texts.jsonl"),
        "--output_dir",
        str(place / out),
        "--k",
        "3",
        "10",
        *more,
    ]


def whole(place: Path, model: Path) -> tuple[str, ...]:
    controls = ("--unrelated", str(place / "bert"), "--ceiling", str(place / "further"))
    more = (*controls, "--label_column", "kind", "--more", f"itself={model}")
    return *more, "--sample", "250"


@pytest.fixture(scope="module")
def done(place, qwen3) -> dict[str, dict]:
    """The metrics of a whole request, by name."""
    more = whole(place, qwen3)
    drawn: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:  # the tests of the page draw, which takes seconds
        patch.setattr(page, "write", drawn.append)
        run(parse(flags(place, qwen3, place / "near", "out", *more)))
    assert drawn == [place / "out"]
    return {path.stem: json.loads(path.read_text()) for path in (place / "out" / "metrics").glob("*.json")}


def values(body: dict, k: str | None = None) -> dict:
    return {row["layer"]: row["value"] for row in (body["series"][k] if k else body["layers"])}


def test_every_metric_is_there_with_its_controls(done, place):
    assert done.keys() == metrics.METRICS.keys()
    for name, metric in done.items():
        keys = {"a", "b"} if name in metrics.SHAPE else {"pair", "shuffled"}
        assert keys | {"unrelated", "random", "more:itself", "ceiling"} == metric["comparisons"].keys()
        assert metric["why"] is None
        for key in keys:
            body = metric["comparisons"][key]
            rows = body["layers"] or body["series"]["3"]
            assert [row["layer"] for row in rows] == [0, 1, 2, "pooled"][: 3 if name == "knn_tokens" else 4]
    assert not (place / "out" / "work").exists()
    request = json.loads((place / "out" / "request.json").read_text())
    assert (
        request["models"]["a"]["attention"] == "causal"
        and request["models"]["unrelated"]["attention"] == "bidirectional"
    )
    assert request["texts"]["distinct_documents"] == 80 and request["states_counted_once"]["repeated_texts"] == 1


def test_values_lie_between_floor_and_ceiling(done):
    for name in ("correlation", "h_inv", "cka", "mapped_cosine"):
        own = done[name]["comparisons"]
        for layer in (0, 1, 2):
            floor, pair, itself = (values(own[key])[layer] for key in ("shuffled", "pair", "more:itself"))
            assert floor < pair - 0.3 and pair < itself == pytest.approx(1, abs=1e-3)
            row = next(row for row in own["pair"]["layers"] if row["layer"] == layer)
            assert row["low"] <= row["value"] <= row["high"]
    assert values(done["residual"]["comparisons"]["more:itself"])[2] == pytest.approx(0, abs=1e-6)
    floor = done["h_inv"]["comparisons"]["pair"]["layers"][0]["floor"]
    assert floor == pytest.approx(0.7296 / np.log(32)) and values(done["h_inv"]["comparisons"]["random"])[2] < 0.3
    assert values(done["knn_documents"]["comparisons"]["more:itself"], "3")["pooled"] == 1
    assert (
        done["cka"]["comparisons"]["pair"]["p_value"]
        == done["knn_documents"]["comparisons"]["pair"]["p_value"]
        == 1 / 200
    )


def test_the_difference_to_the_ceiling_has_an_interval(done):
    """The pair stayed closer than what is given as the ceiling."""
    for name, sign in (("correlation", 1), ("cka", 1), ("residual", -1)):
        own = done[name]["comparisons"]
        for layer in (1, 2):
            row, ceiling = (next(r for r in own[key]["layers"] if r["layer"] == layer) for key in ("pair", "ceiling"))
            found = row["minus_ceiling"]
            assert found["value"] == pytest.approx(row["value"] - ceiling["value"])
            low, high = sorted([sign * found["low"], sign * found["high"]])
            assert 0 < low < sign * found["value"] < high
            assert high - low < row["high"] - row["low"] + ceiling["high"] - ceiling["low"], "the blocks are paired"
            assert "left_out" not in row and "minus_ceiling" not in ceiling


def test_all_layers_agree_with_the_same_layers(done):
    own = done["cka"]["comparisons"]["pair"]
    diagonal = np.diag(own["matrix"]["values"])
    assert own["matrix"]["rows"] == [0, 1, 2]
    assert np.allclose(diagonal, [values(own)[layer] for layer in range(3)], atol=0.02), (
        "the sample has no repeated prefix"
    )


def test_an_unlike_model_says_what_cannot_be_had(done):
    for name in TIED:
        body = done[name]["comparisons"]["unrelated"]
        assert body["unit"] == "documents" and "found 2 and 3 layers" in body["why"]
        assert values(body) == {"pooled": None} and "widths 32 and 40" in body["layers"][0]["why"]
    assert done["residual"]["comparisons"]["unrelated"]["layers"][0]["dimensions"] == 32
    assert values(done["cka"]["comparisons"]["unrelated"])["pooled"] is not None
    assert values(done["probe"]["comparisons"]["unrelated"])["pooled"] is not None


@pytest.fixture
def no_page(monkeypatch):
    """Drawing takes seconds, and the tests of the page draw."""
    monkeypatch.setattr(page, "write", lambda folder: None)


def test_a_restart_computes_only_what_is_not_there(done, place, qwen3, monkeypatch, no_page):
    more = whole(place, qwen3)
    args, out = parse(flags(place, qwen3, place / "near", "out", *more)), place / "out"
    loaded = []
    monkeypatch.setattr(Study, "_pass", lambda self, key, folder: loaded.append(key))
    run(args)
    assert loaded == [], "nothing is left: no weights are loaded"
    (out / "metrics" / "probe.json").write_text("{")
    assert run_verb(hrsa.main, flags(place, qwen3, place / "near", "out", *more)) == 2
    with pytest.raises(BaseException) as error:
        run(args)
    assert "delete this damaged file" in str(error.value) and "\n" not in str(error.value)


def test_a_killed_request_goes_on_after_its_last_job(place, qwen3, monkeypatch, no_page):
    given = flags(place, qwen3, place / "near", "killed", "--sample", "200")
    jobs, ran = dict(metrics.JOBS), []

    def counted(name: str, fails: bool) -> metrics.Job:
        def job(pair):
            ran.append((pair.key, name))
            if fails and pair.key == "random":
                raise KeyboardInterrupt
            return jobs[name].run(pair)

        return jobs[name]._replace(run=job)

    for name in jobs:
        monkeypatch.setitem(metrics.JOBS, name, counted(name, fails=name == "probe"))
    assert run_verb(hrsa.main, given) == 130
    before, ran = set(ran) - {("random", "probe")}, []
    for name in jobs:
        monkeypatch.setitem(metrics.JOBS, name, counted(name, fails=False))
    run(parse(given))
    assert len(before) == 7 and not before & set(ran) and ran == [("random", "probe"), ("random", "shape")]
    why = json.loads((place / "killed" / "metrics" / "probe.json").read_text())["why"]
    assert why == metrics.NO_LABELS, "no label column: the others went on"


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--k", "90"], "found 80 distinct texts, wanted at least 20, and more than --k 90"),
        (["--where", "kind=z"], "found no text that --where keeps"),
        (["--more", "a=x", "a=y"], "--more: found 'a=y', wanted NAME=MODEL, each name once"),
        (["--checkpoints", "nowhere"], "--checkpoints nowhere: found no checkpoint-N"),
        (["--max_length", "4096"], "--max_length 4096: found a model of at most 1024 tokens"),
        (["--device", "gpu"], "--device: found 'gpu', wanted cpu or cuda"),
        (["--ceiling", "nowhere"], "error: nowhere: found no such folder, and no config.json of a model"),
        (["--sample", "3"], "--sample: found 3, wanted at least 100"),
        (["--seed", "1"], "found another request there (options, seed: 0; now 1)"),
    ],
)
def test_bad_requests_are_one_line(more, wanted, done, place, qwen3, capsys, monkeypatch):
    monkeypatch.chdir(place)
    out, given = ("out", whole(place, qwen3)) if "--seed" in more else ("refused", ())
    assert run_verb(hrsa.main, flags(place, qwen3, place / "near", out, *given, *more)) == 2
    message = capsys.readouterr().err
    assert wanted in message and message.count("\n") == 1
    assert not (place / "refused").exists()
