"""`gritlm evaluate`: models of every kind on the same sets, results that are kept, failures that stop nothing else."""

import json
import random
import shutil

import numpy as np
import pytest
from helpers import INSTRUCTION, WORDS, make_model_folder, words

from gritlm import GritLM
from gritlm.errors import UserError
from gritlm.evaluation.evaluate import main
from gritlm.evaluation.models import find_model, rank_by_bm25
from gritlm.evaluation.read_sets import read_sets
from gritlm.evaluation.results import read_results
from gritlm.evaluation.sets import RetrievalSet

PROMPTS = {"query": "Query: ", "document": "Passage: "}


@pytest.fixture(scope="module")
def model(qwen3, tmp_path_factory):
    """An untrained model folder with prompts of its own."""
    folder = tmp_path_factory.mktemp("models") / "run"
    make_model_folder(qwen3, folder, query_max_len=48, passage_max_len=64, prompts=PROMPTS)
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """One file of each kind; texts occur several times."""
    folder, rng = tmp_path_factory.mktemp("sets"), random.Random(0)
    common = [words(rng, 20, 40) for _ in range(3)]
    pairs = [(words(rng, 2, 5), common[n % 3] if n % 5 == 0 else words(rng, 4, 30)) for n in range(40)]
    rows = {
        "plain": [{"query": query, "pos": [passage], "neg": []} for query, passage in pairs],
        "told": [{"query": [INSTRUCTION, query], "pos": [passage], "neg": []} for query, passage in pairs],
        "sts": [{"sentence1": a, "sentence2": b, "score": n % 5} for n, (a, b) in enumerate(pairs)],
        "labels": [{"text": b, "label": "long" if len(b) > 60 else "short"} for _, b in pairs],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def evaluate(model, tmp_path, capsys):
    """`gritlm evaluate model`: its exit code, what it printed, and each result it wrote by set."""

    def go(*flags, model=model):
        out = tmp_path / "out"
        code = main([*map(str, (model, "--output_folder", out, *flags))])
        printed = capsys.readouterr()
        written = {
            found.sets[0].name: found
            for path in sorted(out.glob("*/*-??????????.json"))
            for found in [read_results(path)]
        }
        return code, printed.out + printed.err, written

    return go


def test_a_folder_and_its_sentence_transformers_form_get_the_same_numbers(model, sets, evaluate, tmp_path):
    """On every kind of set, with instructions of the set's and of the model's; each text with its side's limit."""
    other = shutil.copytree(model, tmp_path / "other")
    (other / "text_contract.json").unlink()
    config = json.loads((other / "sentence_bert_config.json").read_text())
    (other / "sentence_bert_config.json").write_text(json.dumps(config | {"max_seq_length": 64}))
    code, printed, _ = evaluate("--benchmark", sets, "--against", other)
    assert code == 0
    found = [
        {
            path.name.rpartition("-")[0]: read_results(path)
            for path in (tmp_path / "out" / name).glob("*-??????????.json")
        }
        for name in ("run", "other")
    ]
    assert found[0].keys() == found[1].keys() == {"plain", "told", "sts", "labels"}
    kinds = [{name: results.about["identity"]["kind"] for name, results in side.items()} for side in found]
    assert set(kinds[0].values()) == {"gritlm"} and set(kinds[1].values()) == {"sentence-transformers"}
    for name, ours in found[0].items():
        assert ours.sets[0].metrics == pytest.approx(found[1][name].sets[0].metrics, abs=1e-4), name
        assert ours.about["model"]["width"] == 32
        prompts = {"query": "Query: ", "passage": "Passage: "}
        assert ours.about["model"]["prompts"] == found[1][name].about["model"]["prompts"] == prompts
    assert "none of 4 sets better, none worse" in printed
    assert found[0]["plain"].sets[0].metrics != found[0]["told"].sets[0].metrics, "control: the instruction counts"
    assert "no run.json that names its training data" in printed


def test_vectors_are_also_searched_cut_and_quantised(model, sets, evaluate, tmp_path):
    forms = ["--precisions", "float32", "binary", "--truncate_dim", "8"]
    benchmark = ["--benchmark", sets / "plain.jsonl", sets / "sts.jsonl", *forms]
    code, printed, found = evaluate(*benchmark, "--against", "bm25")
    assert code == 0 and printed.count("bm25: --precisions, --truncate_dim have no effect on it") == 1
    rows = {(row["width"], row["precision"]): row for row in found["plain"].sets[0].compressed}
    assert set(rows) == {(32, "float32"), (32, "binary"), (8, "float32"), (8, "binary")}
    assert rows[32, "float32"]["metrics"] == found["plain"].sets[0].metrics and found["sts"].sets[0].compressed == []
    assert "plain, 8 binary" in printed
    assert f"plain: {model}: read from" in evaluate(*benchmark)[1]
    assert f"plain: {model}: read from" not in evaluate(*benchmark[:-1], "16")[1], "control: other forms"
    own = shutil.copytree(model, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [16, 4]}))
    evaluate("--benchmark", sets / "plain.jsonl", "--precisions", "int8", model=own)
    (written,) = (tmp_path / "out" / "own").glob("plain-*.json")
    assert [row["width"] for row in read_results(written).sets[0].compressed] == [32, 16, 4]


def test_forms_that_do_not_fit_are_refused(sets, evaluate):
    plain = ["--benchmark", sets / "plain.jsonl"]
    code, printed, _ = evaluate(*plain, "--truncate_dim", "33")
    assert code == 2 and "--truncate_dim: found 33, wanted at most the 32 dimensions of" in printed
    for flags, said in (
        ([*plain, "--truncate_dim", "0"], "--truncate_dim: found 0, wanted a number of dimensions"),
        ([*plain, "--precisions", "int4"], "invalid choice: 'int4'"),
        (["--benchmark", sets / "sts.jsonl", "--precisions", "int8"], "found no retrieval set, wanted one"),
        (["--benchmark", "NanoBEIR", "--precisions", "int8"], "--precisions: found no path in --benchmark"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate(*flags)


def test_texts_are_encoded_as_queries_and_passages_of_the_model(model, tmp_path):
    texts = [" ".join(WORDS), "river", "stone quiet", "river"]
    found, grit = find_model(str(model), None, 24, 100, tmp_path), GritLM(model)
    found.load()
    wanted = {
        "query": (grit.encode_queries(texts), None),
        "passage": (grit.encode(texts, "Passage: ", 24), None),
    }
    for side, (vectors, instructions) in wanted.items():
        assert np.allclose(found.encode(texts, side, instructions), vectors, atol=1e-5)
    mixed = found.encode(texts, "query", ["", INSTRUCTION, "", ""])
    assert np.allclose(mixed[1], grit.encode_queries("river", instruction=INSTRUCTION), atol=1e-5)
    assert np.allclose(mixed[3], grit.encode_queries("river", instruction=""), atol=1e-5)
    assert not np.allclose(wanted["passage"][0][0], grit.encode(texts[0], "Passage: "), atol=1e-3), "control: the limit"


def test_bm25_ranks_every_script_and_orders_ties():
    queries = ["the river of stones", "检索", "the of"]
    corpus = ["river stone", "copper", "a river", "文本检索模型", "river stone", "文本模型"]
    grades = [{"1": 1}, {"3": 1}, {"0": 1}]
    data = RetrievalSet("s", queries, ["a", "b", "c"], corpus, list("012345"), grades)
    ranked = [[data.corpus_ids[number] for number in row] for row in rank_by_bm25(data).tolist()]
    # Among equal scores the larger id comes first, as in trec_eval.
    assert ranked == [["4", "0", "2", "5", "3", "1"], ["3", "5", "4", "2", "1", "0"], ["5", "4", "3", "2", "1", "0"]]
    many = RetrievalSet("s", ["river"], ["a"], ["x", *["river"] * 200], [f"{n:03}" for n in range(201)], [{"000": 1}])
    assert rank_by_bm25(many).tolist() == [list(range(101))], "ties at the cut, in order"


def test_results_are_kept_until_what_they_depend_on_changes(model, sets, evaluate, tmp_path):
    changed = shutil.copytree(model, tmp_path / "run")
    flags = ("--benchmark", sets / "plain.jsonl")
    _, printed, first = evaluate(*flags, model=changed)
    assert "read from" not in printed and "plain" in printed
    (changed / "README.md").write_text("other")
    (changed / "evaluation").mkdir()
    (changed / "evaluation" / "step-1.json").write_text("{}")
    code, printed, again = evaluate(*flags, model=changed)
    assert code == 0 and "plain: " in printed and "read from" in printed and again == first
    for more in (["--overwrite"], ["--query_max_len", 24], ["--passage_max_len", 24]):
        code, printed, _ = evaluate(*flags, *more, model=changed)
        assert code == 0 and "read from" not in printed, more
    assert "read from" in evaluate(*flags, "--passage_max_len", 24, model=changed)[1]
    assert len(list((tmp_path / "out" / "run").iterdir())) == 3
    (changed / "text_contract.json").write_text(
        (changed / "text_contract.json").read_text().replace('"Query: "', '"Question: "')
    )
    assert "read from" not in evaluate(*flags, model=changed)[1], "other files"


def test_prompts_of_a_file_take_the_place_of_the_models_and_the_sets(sets, evaluate, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"told": "Query: "}))  # the model's own, whole
    code, printed, found = evaluate("--benchmark", sets / "plain.jsonl", sets / "told.jsonl", "--prompts", prompts)
    assert code == 0 and "gives the instruction of 1 of 2 sets" in printed
    assert found["told"].sets[0].metrics == found["plain"].sets[0].metrics
    assert found["told"].about["identity"]["prompts"] == {"query": "Query: "}
    prompts.write_text(json.dumps({"told": "Find"}))
    assert "read from" not in evaluate("--benchmark", sets / "told.jsonl", "--prompts", prompts)[1]


def test_a_set_that_fails_stops_no_other(model, sets, evaluate, tmp_path):
    """A set without room for its instruction, a path that is no set, a disk that takes nothing."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n')
    flags = ("--benchmark", sets, bad, "--query_max_len", 5)
    code, printed, found = evaluate(*flags)
    assert code == 1 and found.keys() == {"plain", "sts", "labels"}
    failed = printed.split("failed:\n")[1].splitlines()
    assert failed[0].startswith(f"  {bad}: found the columns a") and failed[1].startswith("  told: ")
    assert evaluate(*flags)[1].count("read from") == 3
    assert evaluate("--benchmark", sets / "told.jsonl", "--query_max_len", 5)[0] == 2
    shutil.rmtree(tmp_path / "out" / "run")
    (tmp_path / "out" / "run").write_text("")
    code, printed, found = evaluate("--benchmark", sets / "plain.jsonl")
    assert code == 1 and not found and "plain       0." in printed
    assert "not written: " in printed.split("failed:\n")[1]


def test_against_another_model(model, sets, evaluate, qwen3, tmp_path):
    """A narrower model, BM25, a backbone; a drop that the user bounds."""
    make_model_folder(qwen3, tmp_path / "narrow", projection=16, prompts=PROMPTS)
    code, printed, _ = evaluate("--benchmark", sets, "--against", tmp_path / "narrow", "--max_drop", 1)
    assert code == 0 and f"{model} has width 32, {tmp_path / 'narrow'} 16: compared by scores" in printed
    shutil.rmtree(tmp_path / "out")
    fallen = []
    for names in ((model, "bm25"), ("bm25", model)):
        flags = ("--benchmark", sets, "--against", names[1], "--max_drop", 0, "--passage_max_len", 24)
        code, printed, _ = evaluate(*flags, model=names[0])
        assert "sts: left out, bm25 only ranks passages" in printed
        assert "bm25: --passage_max_len has no effect on it" in printed
        assert "not in the verdict, because one model has no result: labels, sts" in printed
        assert f"verdict: {names[1]} -> {names[0]}: nDCG@10 0." in printed
        (path,) = (tmp_path / "out").glob("*/against-*.json")
        verdict = json.loads(path.read_text())
        assert verdict["line"] in printed and [row["name"] for row in verdict["sets"]] == ["plain", "told"]
        fell = [row["name"] for row in [*verdict["sets"], verdict["mean"]] if row["tuned"] < row["base"]]
        assert [line.split(":")[0] for line in verdict["drops"]] == fell and code == bool(fell)
        assert all(f"  {line}\n" in printed for line in verdict["drops"])
        fallen += fell
        path.unlink()
    assert fallen
    shutil.rmtree(tmp_path / "out")
    code, printed, found = evaluate("--benchmark", sets / "plain.jsonl", model=qwen3)
    assert code == 0 and "a backbone, measured as it is before training" in printed
    assert found["plain"].about["identity"]["kind"] == "backbone"
    assert evaluate("--benchmark", sets / "sts.jsonl", model="bm25")[0] == 2


def test_what_is_given_wrongly_gives_one_line(model, sets, evaluate, tmp_path, monkeypatch):
    plain, copy = sets / "plain.jsonl", shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "unfinished" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for flags, message in (
        (["--benchmark", tmp_path / "none"], "--benchmark: found no .*none, wanted a file, a folder or a name"),
        (["--benchmark", "none.jsonl"], "--benchmark: found no none.jsonl"),
        (["--benchmark", plain, "--langs", "eng"], "--langs: found no task of mteb in --benchmark"),
        (["--benchmark", plain, "--max_drop", "0.1"], "--max_drop: found no --against"),
        (["--benchmark", plain, "--against", "bm25", "--max_drop", "nan"], "--max_drop: found nan, wanted 0 to 1"),
        (["--benchmark", plain, "--query_max_len", 0], "--query_max_len: found 0, wanted 1 or more"),
        (["--benchmark", plain, "--seed", -1], "--seed: found -1, wanted 0 or more"),
        (["--benchmark", plain, "--passage_max_len", 5000], "found a model of at most 1024 tokens"),
        (["--benchmark", plain, "--instruction_template", "{instruction}"], "wanted --prompts FILE"),
        (["--benchmark", plain, "--prompts", tmp_path / "none"], "--prompts .*: No such file"),
        (["--benchmark", plain, "--against", copy], "--against .*copy: found the files of"),
        (["--benchmark", plain, "--against", tmp_path / "none"], "none: found no such folder, wanted a model's"),
        (["--benchmark", plain, "--against", tmp_path / "empty"], "found no config.json and no modules.json"),
        (["--benchmark", plain, "--against", tmp_path / "unfinished"], "its newest checkpoint is .*checkpoint-5"),
        (["--benchmark", tmp_path / "empty"], "empty: found no evaluation set in it"),
    ):
        with pytest.raises(UserError, match=message) as error:
            evaluate(*flags)
        assert "\n" not in str(error.value)
    with pytest.raises(OSError) as refused:
        main([str(model), "--benchmark", str(plain), "--output_folder", str(plain)])
    assert refused.value.filename == str(plain)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="wanted gritlm evaluate in one process"):
        evaluate("--benchmark", plain)


def test_sets_of_a_folder_share_their_corpus(model, tmp_path):
    """The second set's passages are those of the first and are not encoded again."""
    for name in ("corpus", "queries"):
        rows = [{"_id": str(n), "text": f"{name} {word}"} for n, word in enumerate(WORDS)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels").mkdir()
    for split in ("dev", "test"):
        (tmp_path / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\t1\n2\t2\t1\n")
    dev, test = read_sets([str(tmp_path / "qrels" / f"{split}.tsv") for split in ("dev", "test")])
    found = find_model(str(model), None, None, 1000, tmp_path)
    found.load()
    first = found.measure(dev, {})
    encode, encoded = found._encode, []
    found._encode = lambda texts, *more: encoded.append(len(texts)) or encode(texts, *more)
    assert found.measure(test, {}).metrics == first.metrics
    assert encoded == [2], "the two queries"


@pytest.mark.long  # mteb makes all its tasks
def test_a_set_and_a_benchmark_in_one_call(sets, evaluate):
    """The task's data is not here: it fails, and the set has its result. A wrong name fails before the work."""
    code, printed, found = evaluate("--benchmark", sets / "plain.jsonl", "NFCorpus")
    assert code == 1 and found.keys() == {"plain"}
    assert "NFCorpus: failed: its data mteb/nfcorpus is not in the cache" in printed
    with pytest.raises(UserError, match=r"'NFCorpsu': .* the nearest are NFCorpus"):
        evaluate("--benchmark", sets / "told.jsonl", "NFCorpsu")
    assert evaluate("--benchmark", sets / "plain.jsonl")[2].keys() == {"plain"}, "told was not measured"
