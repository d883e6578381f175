"""The texts, the positions, and the states of models, against transformers run by hand."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build_family
from helpers import make_model_folder
from transformers import AutoModel

from gritlm.analysis.states import Positions, StateModel, batches
from gritlm.analysis.texts import read
from gritlm.errors import UserError
from gritlm.models.families import model_options

TEXTS = ["quiet engine", "river stone quiet engine under snow", "seven bridges", "a", "thunder over the harbour market"]


@pytest.fixture(params=["causal", "embedder", "encoder"])
def folder(request, qwen3, tmp_path) -> Path:
    if request.param == "causal":
        return qwen3
    if request.param == "encoder":
        return build_family(tmp_path / "bert", "bert")
    make_model_folder(qwen3, tmp_path / "model", append_eos=True)
    return tmp_path / "model"


def test_states_are_those_of_each_text_alone(folder, tmp_path):
    model = StateModel(str(folder), 32, tmp_path)
    model.load(torch.device("cpu"), seed=0)
    ids = model.tokenize(TEXTS)
    states, vectors = model.states(ids)
    alone = AutoModel.from_pretrained(folder, output_hidden_states=True, **model_options(model.config)).eval()
    if model.config.model_type != "bert":
        alone.config.is_causal = model.causal
    causal = model.about(True)["attention"] == "causal"
    assert causal == (folder.name.startswith("qwen3"))
    for number, own in enumerate(ids):
        with torch.no_grad():
            wanted = alone(torch.from_numpy(own)[None].long()).hidden_states
        assert len(wanted) == len(states) == model.layers
        inner = slice(model.before, len(own) - model.after)
        for layer in range(model.layers):
            assert torch.allclose(states[layer][number], wanted[layer][0, inner], atol=1e-5)
        assert torch.allclose(vectors[number], torch.nn.functional.normalize(wanted[-1][0].mean(0), dim=0), atol=1e-5)


def test_random_weights_are_not_those_of_the_model(qwen3, tmp_path):
    found = []
    for random in (False, True):
        model = StateModel(str(qwen3), 32, tmp_path, random=random)
        model.load(torch.device("cpu"), seed=1_000_003)
        found.append(model.states(model.tokenize(TEXTS))[1])
    assert (found[0] * found[1]).sum(1).max() < 0.9


def test_the_sample_has_each_prefix_once():
    texts = [np.array(ids) for ids in ([1, 2, 3], [1, 2, 4, 5], [1, 2], [7], [7, 1, 2], [1, 2, 3, 9])]
    found = Positions(texts, 100, 0)
    prefixes = [tuple(texts[d][: p + 1]) for d, p in zip(found.documents, found.places, strict=True)]
    every = {tuple(ids[: place + 1]) for ids in texts for place in range(len(ids))}
    assert len(prefixes) == len(set(prefixes)) == len(every) and set(prefixes) == every
    assert found.repeated == sum(map(len, texts)) - len(every)
    assert [*found.places[found.of(1)]] == [p for d, p in zip(found.documents, found.places, strict=True) if d == 1]
    few = Positions(texts, 4, 0)
    assert len(few.places) == 4 and (np.diff(few.documents) >= 0).all()


def test_batches_hold_every_document_once():
    lengths = np.array([5, 9, 2, 30, 2, 7])
    found = [*batches(lengths, 16)]
    assert sorted(np.concatenate(found)) == list(range(6))
    assert all(lengths[part].sum() <= 16 or len(part) == 1 for part in found)


# ---- texts


def request(path: Path, **flags) -> argparse.Namespace:
    usual = {"texts": path, "text_column": "text", "label_column": None, "where": [], "max_texts": 0, "seed": 0}
    return argparse.Namespace(**usual | flags)


ROWS = [
    {"text": f"text {number}", "ok": number % 3 > 0, "kind": "ab"[number % 2], "length": number / 7, "few": number % 3}
    for number in range(12)
]


def test_rows_labels_and_conditions(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[1]]))
    found = read(request(path, where=["ok=true", "kind=b"], label_column="length"))
    assert found.texts == ["text 1", "text 5", "text 7", "text 11"] and (found.rows, found.repeats) == (5, 1)
    assert found.labels.dtype == np.float64 and found.labels[1] == 5 / 7
    for column, wanted in (("kind", {"a", "b"}), ("few", {"0", "1", "2"}), ("ok", {"true", "false"})):
        assert set(read(request(path, label_column=column)).labels) == wanted
    some = read(request(path, max_texts=5, label_column="kind"))
    assert len(some.texts) == 5 and all(
        "ab"[int(t.split()[1]) % 2] == label for t, label in zip(some.texts, some.labels, strict=True)
    )


def test_plain_text_is_a_text_a_line(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("one, two\n\nthree\tfour\none, two\n")
    assert read(request(path))[0::2] == (["one, two", "three\tfour"], 3)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"text_column": "trace"}, "--text_column trace: found the columns text, ok"),
        ({"label_column": "topic"}, "--label_column topic: found the columns"),
        ({"where": ["ok"]}, "--where: found 'ok', wanted COLUMN=VALUE"),
        ({"where": ["ok=True"]}, "found no text that --where keeps (the last row: ok=true)"),
        ({"text_column": "length"}, "found 0.0, wanted a text"),
    ],
)
def test_bad_requests_are_one_line(flags, wanted, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(UserError) as error:
        read(request(path, **flags))
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_bad_files_are_one_line(tmp_path):
    (tmp_path / "none.jsonl").write_text(json.dumps({"text": "a", "kind": None}))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for name, flags, wanted in (
        ("none.jsonl", {"label_column": "kind"}, "found a row without a value"),
        ("latin.txt", {}, "found bytes that are not UTF-8"),
        ("latin.txt", {"label_column": "kind"}, "found plain text, wanted named columns"),
        ("absent.jsonl", {}, "found no file"),
    ):
        with pytest.raises(UserError, match=wanted):
            read(request(tmp_path / name, **flags))
