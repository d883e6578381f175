"""mine agrees with sentence-transformers, continues after a kill, and each rule removes what it promises."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from datasets import Dataset
from helpers import INSTRUCTION, ROOT, run, words
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from gritlm.curation.embedding import embed
from gritlm.curation.mine import main
from gritlm.errors import UserError
from gritlm.models.folder import load_model_folder, save_model_folder
from gritlm.models.text import Text, TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def served(qwen3, tmp_path_factory):
    """A model folder that this project and sentence-transformers load."""
    contract = TextContract(query_max_len=64, passage_max_len=64)
    embedder, _ = load_model_folder(str(qwen3), contract)
    folder = tmp_path_factory.mktemp("served")
    save_model_folder(embedder, TextTokenizer(load_tokenizer(str(qwen3), contract), contract), folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """300 rows. Some queries have several positives, and some positives have several queries."""
    import random

    rng = random.Random(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    common = [words(rng, 4, 12) for _ in range(5)]
    with open(path, "w") as out:
        for number in range(300):
            query = words(rng, 3, 9) if number % 10 else common[number % 4]
            positive = words(rng, 4, 14) if number % 7 else common[number % 5]
            out.write(json.dumps({"query": [INSTRUCTION, query], "pos": [positive], "neg": []}) + "\n")
    return path


def mined(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def flags(pairs, out, served, tmp_path, *more) -> list[str]:
    return [*map(str, (pairs, out, "--model", served, "--data_cache", tmp_path / "cache", *more))]


@pytest.mark.parametrize(
    "more", [{}, {"range_min": 5, "max_score": 0.9}, {"absolute_margin": 0.01, "num_negatives": 7}]
)
def test_the_negatives_are_those_of_sentence_transformers(pairs, served, tmp_path, more):
    options = [part for name, value in more.items() for part in (f"--{name}", value)]
    main(flags(pairs, tmp_path / "out", served, tmp_path, "--output_scores", *options))
    ours = mined(tmp_path / "out")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    data = Dataset.from_dict({"query": [r["query"][1] for r in rows], "positive": [r["pos"][0] for r in rows]})
    settings = {"range_max": 100, "relative_margin": 0.05, "num_negatives": 3} | more
    model = SentenceTransformer(str(served), device="cpu")
    prompts = {"query_prompt": "", "corpus_prompt": ""}
    theirs = mine_hard_negatives(data, model, output_format="labeled-list", verbose=False, **prompts, **settings)
    wanted = {}
    for row in theirs:
        for passage, label in zip(row["positive"], row["labels"], strict=True):
            if not label:
                wanted.setdefault(row["query"], set()).add(passage)
    same = sum(set(row["neg"]) == wanted.get(row["query"][1], set()) for row in ours)
    assert same >= 0.99 * len(ours), f"{same} of {len(ours)}"
    assert sum(len(row["neg"]) for row in ours) > 300
    for row in ours:
        assert not set(row["neg"]) & set(row["pos"])
        assert row["scores"]["neg"] == sorted(row["scores"]["neg"], reverse=True)


def test_negatives_obey_the_rules_and_the_same_flags_continue_the_run(pairs, served, tmp_path, capsys):
    extra = tmp_path / "extra.jsonl"
    extra.write_text("".join(json.dumps(f"an extra passage, number {n}") + "\n" for n in range(40)))
    more = ["--corpus", extra, "--corpus_only", "--relative_margin", "none", "--max_score", 0.1, "--num_negatives", 4]
    more += ["--sampling_strategy", "random", "--output_scores"]
    main(flags(pairs, tmp_path / "out", served, tmp_path, *more))
    printed = capsys.readouterr().out
    assert "scores of positives |" in printed
    assert "    max_score " in printed
    for row in mined(tmp_path / "out"):
        assert all(text.startswith("an extra passage") for text in row["neg"])
        assert all(score <= 0.1 for score in row["scores"]["neg"])
    main(flags(pairs, tmp_path / "out", served, tmp_path, *more))
    assert "exists already, skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="was mined with corpus_only True, now False"):
        main(flags(pairs, tmp_path / "out", served, tmp_path))
    with open(extra, "a") as out:
        out.write('"one more"\n')
    with pytest.raises(UserError, match="was mined with corpus texts "):
        main(
            flags(pairs, tmp_path / "out", served, tmp_path, *more, "--sampling_strategy", "random", "--output_scores")
        )
    with pytest.raises(UserError, match="is in DATA"):
        main(flags(pairs.parent, pairs.parent / "mined", served, tmp_path))


def test_a_killed_run_continues_with_the_vectors_it_has(pairs, served, tmp_path):
    """kill -9 while embedding. The result is that of an undisturbed run."""
    served = shutil.copytree(served, tmp_path / "model")
    out = served / "mined"  # in the model's own folder
    command = [*flags(pairs, out, served, tmp_path), "--num_negatives", "5"]
    slow = (
        "import sys, time, gritlm.curation.mine as m, gritlm.curation.embedding as e\n"
        "e.FLUSH_EVERY = 64\n"
        "load = m.load_encoder\n"
        "def slowly(*a):\n"
        "    encode = load(*a)\n"
        "    def one(texts):\n"
        "        print('embedding', len(texts), flush=True); time.sleep(float(sys.argv[1])); return encode(texts)\n"
        "    return one\n"
        "m.load_encoder = slowly\n"
        "m.main(sys.argv[2:])\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "1", *command], cwd=ROOT, env=environment, stdout=-1, text=True
    )
    for _ in range(4):
        while "embedding" not in process.stdout.readline():
            time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (work,) = [path for path in out.iterdir() if path.is_dir()]
    assert int((work / "queries.done").read_text()) == 192
    before = np.load(work / "queries.npy")[:192].copy()
    assert np.abs(before).sum(1).min() > 0
    command[1] = os.path.relpath(out, ROOT)  # the same folder by another name
    resumed = run("-c", slow, "0", *command)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    corpus = len({json.loads(line)["pos"][0] for line in pairs.read_text().splitlines()})
    assert resumed.stdout.count("embedding") == -(-(300 - 192) // 64) + -(-corpus // 64)
    assert not work.exists()
    main([*flags(pairs, tmp_path / "whole", served, tmp_path), "--num_negatives", "5"])
    assert mined(out) == mined(tmp_path / "whole")


def test_flags_change_the_negatives_as_documented(pairs, served, tmp_path):
    """The seed decides a random draw; kept negatives are not mined again; instructions change the scores."""
    few = tmp_path / "pairs.jsonl"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()[:40]]
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        row["neg"] = [other["pos"][0]] if other["pos"] != row["pos"] else []
    few.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--relative_margin", "none", "--range_max", 30, "--output_scores"]

    def go(name, *flags_):
        main(flags(few, tmp_path / name, served, tmp_path, *more, *flags_))
        return mined(tmp_path / name)

    drawn = [go(f"r{n}", "--sampling_strategy", "random", "--seed", seed) for n, seed in enumerate((1, 1, 2))]
    assert drawn[0] == drawn[1] != drawn[2]
    top = go("top")
    assert {len(row["neg"]) for row in drawn[0]} == {3} and drawn[0] != top
    kept = go("kept", "--keep_negatives", "--num_negatives", 30, "--range_max", 30)
    for row, before in zip(kept, rows, strict=True):
        assert row["neg"][: len(before["neg"])] == before["neg"]
        assert len(set(row["neg"])) == len(row["neg"])
        assert row["scores"]["neg"][: len(before["neg"])] == [None] * len(before["neg"])
    assert [row["scores"] for row in go("with", "--keep_instruction")] != [row["scores"] for row in top]
    least = go("least", "--min_score", 0.5)
    assert all(score >= 0.5 for row in least for score in row["scores"]["neg"])
    assert min(score for row in top for score in row["scores"]["neg"]) < 0.5, "control"


def test_a_finished_data_set_is_skipped(pairs, served, tmp_path, capsys):
    """A trailing slash names the same folder. The work folder of a finished set is removed."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("nq", "nq-hard"):
        (data / f"{name}.jsonl").write_text("\n".join(pairs.read_text().splitlines()[:20]) + "\n")
    main(flags(f"{data}/", out, served, tmp_path))
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "nq-hard.jsonl").unlink()
    (out / ".nq").mkdir()
    capsys.readouterr()
    main(flags(data, out, served, tmp_path))
    assert capsys.readouterr().out.count("exists already, skipped") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_a_changed_model_with_the_same_name_is_refused(pairs, served, tmp_path):
    model = shutil.copytree(served, tmp_path / "model")
    main(flags(pairs, tmp_path / "out", model, tmp_path))
    weights = model / "model.safetensors"
    os.utime(weights, (1, 1))
    main(flags(pairs, tmp_path / "out", model, tmp_path))  # the same bytes: goes on
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    os.utime(weights, (1, 1))
    with pytest.raises(UserError, match="was mined with model files "):
        main(flags(pairs, tmp_path / "out", model, tmp_path))
    (tmp_path / "out" / "mine.json").write_text("{")
    with pytest.raises(UserError, match=r"mine\.json: found a damaged file"):
        main(flags(pairs, tmp_path / "out", model, tmp_path))


def test_vectors_that_are_not_finite_are_refused(pairs, served, tmp_path):
    model = shutil.copytree(served, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["norm.weight"][:] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        main(flags(pairs, tmp_path / "out", model, tmp_path))
    with pytest.raises(UserError, match="pairs corpus: found a vector that is not finite, of 'b'"):
        embed(lambda texts: np.array([[1.0], [np.nan]]), [Text("", "a"), Text("", "b")], tmp_path / "v", "pairs corpus")


def test_files_of_other_programs_are_not_overwritten(pairs, served, tmp_path):
    out = tmp_path / "data"
    out.mkdir()
    (out / "pairs.jsonl").write_bytes(pairs.read_bytes())
    with pytest.raises(UserError, match=r"pairs\.jsonl exists without the mine\.json of its run"):
        main(flags(pairs, out, served, tmp_path))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {"pairs.jsonl": pairs.read_bytes()}


def test_a_bad_flag_gives_one_line(pairs, served, tmp_path):
    blank = tmp_path / "blank.jsonl"
    blank.write_text('"text"\n\n" "\n')
    for model, more, message in (
        ("nowhere/nothing", [], "nowhere/nothing: found no such folder, and no config.json"),
        (served, ["--range_min", "99", "--num_negatives", "3"], "wanted room for --num_negatives 3"),
        (served, ["--corpus_only"], "leaves no passage to choose from"),
        ("nowhere/nothing", ["--seed", "-1"], "--seed -1: wanted 0 or more"),
        ("nowhere/nothing", ["--corpus", blank], r"blank\.jsonl:3: found an empty text"),
        (served, ["--cross_encoder", "nowhere/nothing"], "nowhere/nothing: found no such folder"),
    ):
        with pytest.raises(UserError, match=message) as error:
            main(flags(pairs, tmp_path / "out", model, tmp_path, *more))
        assert "\n" not in str(error.value)


def test_a_cross_encoder_scores_the_candidates_again(pairs, served, qwen2, tmp_path):
    """With random weights its order differs from that of the vectors. Its scores are written."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=600, num_labels=1, initializer_range=0.5, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "cross")
    AutoTokenizer.from_pretrained(qwen2).save_pretrained(tmp_path / "cross")
    few = tmp_path / "pairs.jsonl"
    few.write_text("\n".join(pairs.read_text().splitlines()[:20]) + "\n")
    more = ["--relative_margin", "none", "--range_max", 8, "--output_scores"]
    main(flags(few, tmp_path / "plain", served, tmp_path, *more))
    main(flags(few, tmp_path / "again", served, tmp_path, *more, "--cross_encoder", tmp_path / "cross"))
    plain, again = mined(tmp_path / "plain"), mined(tmp_path / "again")
    assert [row["neg"] for row in plain] != [row["neg"] for row in again]
    model = CrossEncoder(str(tmp_path / "cross"))
    for row in again[:5]:
        wanted = model.predict([(row["query"][1], text) for text in row["neg"]])
        assert np.allclose(wanted, row["scores"]["neg"], atol=1e-5)
