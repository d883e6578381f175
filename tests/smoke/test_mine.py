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

from gritlm.curation.embedding import Encoder, embed
from gritlm.curation.filter import main as filter_main
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
    with pytest.raises(UserError, match="was made by mine with corpus_only True, now False"):
        main(flags(pairs, tmp_path / "out", served, tmp_path))
    with open(extra, "a") as out:
        out.write('"one more"\n')
    with pytest.raises(UserError, match="was made by mine with corpus texts "):
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
        "encode = e.Encoder.encode\n"
        "def slowly(self, texts, side):\n"
        "    print('embedding', len(texts), flush=True); time.sleep(float(sys.argv[1]))\n"
        "    return encode(self, texts, side)\n"
        "e.Encoder.encode = slowly\n"
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
    (partial,) = work.glob("queries-*.npy.partial")
    assert sorted(path.name for path in partial.glob("*.done")) == ["0.done", "1.done", "2.done"]
    before = np.memmap(partial / "vectors.npy", mode="r", dtype=np.float32, offset=128)[: 192 * 16].reshape(192, 16)
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


def test_labels_stop_the_run_and_other_keys_are_named(served, tmp_path, capsys):
    path, keys = tmp_path / "pairs.jsonl", {"id": 1, "pos_scores": [0.5], "neg_scores": []}
    for more, blocking in (
        ({"label": 0}, "label"),
        ({"score": 0.1}, "score"),
        ({"split": "test"}, "split"),
        (keys, ""),
    ):
        rows = [{"query": f"q{number}", "pos": [f"p{number}"], "neg": []} | more for number in range(6)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = flags(path, tmp_path / "out", served, tmp_path)
        if blocking:
            with pytest.raises(UserError, match=f"found the key '{blocking}' in 6 rows"):
                main(arguments)
    main(arguments)
    assert "keys that are left out of the output: 'id' (6 rows), 'scores' (6 rows)" in capsys.readouterr().out


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
    with pytest.raises(UserError, match="was made by mine with model files "):
        main(flags(pairs, tmp_path / "out", model, tmp_path))
    (tmp_path / "out" / "mine.json").write_text("{")
    with pytest.raises(UserError, match=r"mine\.json: found a damaged file"):
        main(flags(pairs, tmp_path / "out", model, tmp_path))


class Damaged:
    def encode_blocks(self, blocks, side):
        return (np.array([[1.0], [np.nan]]) for _ in blocks)


def test_vectors_that_are_not_finite_are_refused(pairs, served, tmp_path):
    model = shutil.copytree(served, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["norm.weight"][:] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        main(flags(pairs, tmp_path / "out", model, tmp_path))
    with pytest.raises(UserError, match="pairs corpus: found a vector that is not finite, of 'b'"):
        embed(Damaged(), "passage", [Text("", "a"), Text("", "b")], tmp_path / "v", "pairs corpus")


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
        (served, ["--absolute_margin", "nan"], "argument --absolute_margin: found 'nan', wanted a number"),
        ("bm25", [], "--model bm25: found no vectors"),
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


COPIES = [  # query, positive, copies of it, which are no negatives
    ("where do the ferries leave", "Ferries leave from pier six.", ["Harbour Ferries leave from pier six."]),
    ("rain", "Water falls.", ["water falls", "WATER  FALLS!"]),
    ("what is in the box", "passage: a red ball", ["A red ball"]),
    ("long", "The bridge over the river was opened in 1871 by the mayor of the old town.",
     ["The bridge over the river was opened in 1872 by the mayor of the old town."]),
    ("船はどこ", "渡し船は六番桟橋から出ます", ["渡し船は六番桟橋から出ます。", "港 渡し船は六番桟橋から出ます"]),
    ("how old is it", "81 years", ["How old is it?"]),
]  # fmt: skip
OTHERS = ["Water freezes.", "Ferries leave from pier two.", "A blue ball", "18 years", "Trams stop at the mill."]


def test_no_near_copy_of_a_positive_is_a_negative(served, tmp_path, capsys):
    """With a title, in another case, one word changed; also a positive of a query in another case, and the query."""
    pairs, corpus = tmp_path / "pairs.jsonl", tmp_path / "corpus.jsonl"
    rows = [{"query": query, "pos": [positive], "neg": []} for query, positive, _ in COPIES]
    rows += [{"query": "Rain.", "pos": ["Drops from a cloud."], "neg": []}]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    copies = [{"text": text} for _, _, texts in COPIES for text in texts] + [{"text": text} for text in OTHERS]
    copies[0] = {"title": "Harbour", "text": "Ferries leave from pier six."}
    corpus.write_text("".join(json.dumps(row) + "\n" for row in copies))
    more = ["--corpus", corpus, "--relative_margin", "none", "--num_negatives", 20]
    main(flags(pairs, tmp_path / "out", served, tmp_path, *more))
    found = {row["query"]: row for row in mined(tmp_path / "out")}
    for query, positive, texts in COPIES:
        assert not {*texts, positive} & {*found[query]["neg"]}
        assert {*OTHERS, "Trams stop at the mill."} <= {*found[query]["neg"]}, "control"
    assert "Drops from a cloud." not in found["rain"]["neg"] and "Water falls." not in found["Rain."]["neg"]
    assert "Drops from a cloud." in found["long"]["neg"] and "water falls" in found["long"]["neg"], "control"
    assert "near copy of one of these" in capsys.readouterr().out


def test_fill_adds_only_what_is_missing(pairs, served, tmp_path, capsys):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()[:12]]
    for number, row in enumerate(rows):
        row["neg"] = [f"given negative {i} of row {number}" for i in range(number % 4)]
    rows[4]["neg"] = [rows[4]["pos"][0].upper() + "!"]
    few = tmp_path / "pairs.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--relative_margin", "none", "--num_negatives", 2]
    main(flags(few, tmp_path / "fill", served, tmp_path, "--fill", *more))
    main(flags(few, tmp_path / "keep", served, tmp_path, "--keep_negatives", *more))
    rows[4]["neg"] = []  # a copy of its positive
    for row, fill, keep in zip(rows, mined(tmp_path / "fill"), mined(tmp_path / "keep"), strict=True):
        own = len(row["neg"])
        assert fill["neg"] == keep["neg"][: max(own, 2)] and fill["neg"][:own] == row["neg"]
        assert len(keep["neg"]) == own + 2
    printed = capsys.readouterr().out
    assert "0 queries have fewer than 2" in printed
    assert "1 negatives of the rows were near copies of their query or its positives: removed" in printed


def test_two_processes_write_the_file_of_one(pairs, served, tmp_path, monkeypatch):
    monkeypatch.setattr("gritlm.curation.embedding.FLUSH_EVERY", 16)
    few, bits = tmp_path / "pairs.jsonl", []
    few.write_text("\n".join(pairs.read_text().splitlines()[:60]) + "\n")
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        more = ["--output_scores", "--processes", processes, "--vectors", tmp_path / f"vectors{processes}"]
        main(flags(few, out, served, tmp_path, *more))
        bits.append([(out / "pairs.jsonl").read_bytes(), *(v.read_bytes() for v in vectors_in(tmp_path, processes))])
    assert bits[0] == bits[1] and len(bits[0]) == 3
    with pytest.raises(UserError, match="broken: cannot be loaded"):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken/modules.json").write_text("[]")
        main(flags(pairs, tmp_path / "no", tmp_path / "broken", tmp_path, "--processes", 2))
    assert not (tmp_path / "no").exists()


def vectors_in(folder, number) -> list:
    return sorted((folder / f"vectors{number}").glob("*.npy"))


def test_filter_uses_the_vectors_of_mine(pairs, served, tmp_path, monkeypatch):
    """Scores and ranks are those of a plain computation; only texts that mine has not embedded are embedded."""
    extra = tmp_path / "extra.jsonl"
    extra.write_text("".join(json.dumps(f"an extra passage, number {n}") + "\n" for n in range(40)))
    more = ["--corpus", extra, "--vectors", tmp_path / "vectors1"]
    main(flags(pairs, tmp_path / "out", served, tmp_path, *more, "--relative_margin", "none", "--output_scores"))
    rows = mined(tmp_path / "out")
    rows[0] |= {"neg": ["one more negative"], "scores": None}
    (tmp_path / "out/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    embedded, encode = [], Encoder.encode

    def counted(self, texts, side):
        embedded.extend(text.text for text in texts)
        return encode(self, texts, side)

    monkeypatch.setattr(Encoder, "encode", counted)
    rules = ["--max_rank", 40, "--relative_margin", "0.02"]
    filter_main(flags(tmp_path / "out/pairs.jsonl", tmp_path / "clean", served, tmp_path, *more, *rules))
    assert embedded == ["one more negative"]
    model = SentenceTransformer(str(served), device="cpu")
    corpus = [json.loads(line) for line in extra.read_text().splitlines()]
    corpus = [*dict.fromkeys([*corpus, *(text for row in rows for text in row["pos"])])]
    corpus_ND = model.encode(corpus, prompt="", normalize_embeddings=True)
    known: dict[str, set] = {}
    for row in rows:
        known.setdefault(row["query"][1], set()).update(row["pos"])
    kept = {}
    queries_BD = model.encode([row["query"][1] for row in rows], prompt="", normalize_embeddings=True)
    other = model.encode("one more negative", prompt="")
    for row, query in zip(rows, queries_BD, strict=True):
        score = dict(zip(corpus, (corpus_ND @ query).tolist(), strict=True))
        score["one more negative"] = float(other @ query)
        positive = score[row["pos"][0]]
        others = known[row["query"][1]] | {row["query"][1]}
        rank = 1 + sum(score[text] > positive for text in corpus if text not in others)
        if rank <= 40:
            kept[row["query"][1], row["pos"][0]] = [text for text in row["neg"] if score[text] <= 0.98 * positive]
    found = {(row["query"][1], row["pos"][0]): row["neg"] for row in mined(tmp_path / "clean")}
    assert 0 < len(found) < 300 and found.keys() == kept.keys()
    assert sum(found[key] != kept[key] for key in found) <= 1  # a score at the margin, in another order of sums
