"""`gritlm merge`: closed forms in numpy's float64, which models merge, and what is refused before a weight is read."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import INSTRUCTION, make_model_folder
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModelForCausalLM

from gritlm import GritLM
from gritlm.cli import run_verb
from gritlm.serving import merge as module
from gritlm.serving.merge import Model, main, slerp

TEXTS = ["river", "stone engine", "日本語", "def f(x):\n    return x"]
CONTRACT = {"query_max_len": 40, "passage_max_len": 48, "prompts": {"query": INSTRUCTION}}


def tuned(base: Path, folder: Path, seed: int, dtype=torch.float32, noise: float = 0.05, **options) -> Path:
    """A model folder whose weights lie at some distance from the base's."""
    make_model_folder(base, folder, **CONTRACT | options)
    generator = torch.Generator().manual_seed(seed)
    for path in folder.rglob("model.safetensors"):
        found = load_file(path)
        moved = {name: w + noise * torch.randn(w.shape, generator=generator) for name, w in found.items()}
        save_file({name: weight.to(dtype) for name, weight in moved.items()}, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(qwen3, tmp_path_factory) -> dict[str, Path]:
    """Three tunings of one base, and the base as a plain language model: other key names, a head, padded rows, bf16."""
    folder = tmp_path_factory.mktemp("models")
    found = {name: tuned(qwen3, folder / name, seed) for seed, name in enumerate("abc")}
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(qwen3))
    plain.resize_token_embeddings(640)
    plain.to(torch.bfloat16).save_pretrained(folder / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(qwen3 / name, folder / "plain")
    return found | {"plain": folder / "plain"}


def run(capsys, *words: object) -> tuple[int, str]:
    """The exit code, and what was printed."""
    code = run_verb(main, [str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out + said.err


def read(folder: Path) -> dict[str, np.ndarray]:
    """The weights in float64 under their names in the backbone."""
    found = {}
    for path in folder.rglob("model*.safetensors"):
        for name, weight in load_file(path).items():
            found[name.removeprefix("model.")] = weight.double().numpy()
    return found


def formula(a: np.ndarray, b: np.ndarray, w: float) -> np.ndarray:
    cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    angle = np.arccos(cosine)
    return np.sin((1 - w) * angle) / np.sin(angle) * a + np.sin(w * angle) / np.sin(angle) * b


# ---- what the weights are


@pytest.mark.parametrize("family", ["qwen3", pytest.param("qwen2", marks=pytest.mark.long)])
def test_the_weights_are_those_of_the_closed_forms(request, tmp_path, capsys, family):
    """Each weight and the projection, of three models; the forms differ, so one does not pass for the other."""
    base, shares = request.getfixturevalue(family), (0.5, 0.2, 0.3)
    paths = [tuned(base, tmp_path / str(seed), seed, projection=8) for seed in range(3)]
    (paths[0] / "teacher_projection.safetensors").write_bytes(b"")
    (paths[0] / "adapter").mkdir()
    for method in ("average", "slerp"):
        assert run(capsys, *paths, tmp_path / method, "--method", method, "--weights", *shares)[0] == 0
    a, b, c = map(read, paths)
    average, slerped = read(tmp_path / "average"), read(tmp_path / "slerp")
    assert average.keys() == slerped.keys() == a.keys() and "linear.bias" in a
    for name in a:
        wanted = shares[0] * a[name] + shares[1] * b[name] + shares[2] * c[name]
        assert np.abs(average[name] - wanted).max() <= 2**-24 * np.abs(wanted).max()
        first = formula(a[name], b[name], shares[1] / (shares[0] + shares[1]))
        wanted = formula(first, c[name], shares[2])
        assert np.abs(slerped[name] - wanted).max() <= 2**-24 * np.abs(wanted).max()
        assert np.abs(slerped[name] - average[name]).max() > 1e-4 * np.abs(wanted).max(), "control"
    served = SentenceTransformer(str(tmp_path / "slerp"), device="cpu").encode_document(TEXTS)
    assert np.abs(served - GritLM(tmp_path / "slerp").encode_corpus(TEXTS)).max() < 1e-6 and served.shape[1] == 8
    assert {path.name for path in (tmp_path / "slerp").iterdir() if path.is_dir()} == {
        *("1_Pooling", "2_Dense", "3_Normalize"),
    }
    assert not list(tmp_path.glob("*/teacher_projection*"))[1:], "what is not served was copied"


A = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
TURNED = torch.tensor([[0.0, 3.0], [-4.0, 0.0]])  # orthogonal to it
PAIRS = {
    "at a right angle": (A, TURNED, 0.25, math.cos(math.pi / 8) * A + math.sin(math.pi / 8) * TURNED),
    "parallel": (A, 2 * A, 0.25, 1.25 * A),
    "below 1e-3": (A, A + 5e-4 * TURNED, 0.5, A + 2.5e-4 * TURNED),
    "opposite": (A, -A, 0.25, 0.5 * A),
    "zero": (torch.zeros(2, 2), A, 0.25, 0.25 * A),
    "a number": (torch.tensor(2.0), torch.tensor(4.0), 0.5, torch.tensor(3.0)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_slerp_of_special_pairs(name):
    a, b, share, wanted = PAIRS[name]
    found = slerp(iter([a, b]), [1 - share, share])
    assert found.dtype == torch.float64 and (found - wanted).abs().max() < 1e-6


def test_slerp_keeps_the_norm_and_the_average_does_not(models, tmp_path, capsys):
    """Two orthogonal weights of one norm."""
    assert abs(slerp(iter([A, TURNED]), [0.5, 0.5]).norm() - A.norm()) < 1e-6
    assert module.average(iter([A, TURNED]), [0.5, 0.5]).norm() < 0.8 * A.norm()


def test_one_tensor_of_each_model_at_a_time(models, tmp_path, capsys, monkeypatch):
    """Control: the generator of weights made a list holds all of them."""
    held, most = [], []
    load = Model.load

    def counted(self, name):
        weight = load(self, name)
        held.append(torch.as_tensor(weight).untyped_storage()._weak_ref())
        alive = [ref for ref in held if not torch.UntypedStorage._expired(ref)]
        held[:] = alive
        most.append(len(alive))
        return weight

    monkeypatch.setattr(Model, "load", counted)
    words = (models["a"], models["b"], models["c"])
    assert run(capsys, *words, tmp_path / "streamed")[0] == 0
    assert max(most) <= 3
    most.clear()
    wrong = lambda weights, shares: module.average(iter(list(weights)), shares)  # noqa: E731
    monkeypatch.setitem(module.METHODS, "average", wrong)
    assert run(capsys, *words, tmp_path / "listed")[0] == 0 and max(most) >= 3


# ---- which models merge


def test_with_its_base_the_contract_and_the_tokens_of_the_tuned_model_hold(models, tmp_path, capsys):
    """The base is named first, has padded rows, another dtype, other key names and a head."""
    code, said = run(capsys, models["plain"], models["a"], tmp_path / "out", "--weights", 0.25, 0.75)
    assert code == 0
    assert f"{models['plain']}: no text_contract.json; that of {models['a']} holds" in said
    assert "embeddings of 640, 600 rows: the first 600 are kept" in said
    found, plain, a = (read(path) for path in (tmp_path / "out", models["plain"], models["a"]))
    assert found.keys() == a.keys()
    wanted = {name: 0.25 * plain[name][: a[name].shape[0]] + 0.75 * a[name] for name in a}
    assert max(np.abs(found[name] - wanted[name]).max() for name in a) < 1e-6
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}, "the widest"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["dtype"], config["is_causal"]) == (600, "float32", False)
    assert config["architectures"] == ["Qwen3Model"]
    vectors = GritLM(tmp_path / "out").encode_queries(TEXTS)
    served = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode_query(TEXTS)
    assert np.abs(served - vectors).max() < 1e-6, "the prompt"


def test_models_of_other_prompts_and_dtypes_merge_and_half_precision_stays(qwen2, tmp_path, capsys):
    prompts = [{"query": INSTRUCTION, name: f"{name}: "} for name in ("news", "code")]
    paths = [tuned(qwen2, tmp_path / str(n), n, torch.bfloat16, prompts=prompts[n]) for n in (0, 1)]
    assert run(capsys, *paths, "--method", "average", tmp_path / "out")[0] == 0, "a flag before OUT"
    for name in ("text_contract.json", "config_sentence_transformers.json"):
        found = json.loads((tmp_path / "out" / name).read_text())["prompts"]
        assert found.items() >= (prompts[0] | prompts[1]).items()
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    a, b, found = (read(path) for path in (*paths, tmp_path / "out"))
    wanted = {name: torch.tensor((a[name] + b[name]) / 2).bfloat16().double().numpy() for name in a}
    assert all((found[name] == wanted[name]).all() for name in a), "rounded once"


def test_an_embedding_model_of_others_merges_under_the_contract_of_ours(models, qwen3, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    SentenceTransformer(str(qwen3), device="cpu").save(str(theirs))
    code, said = run(capsys, theirs, models["a"], tmp_path / "out")
    assert code == 0 and f"{theirs}: no text_contract.json; that of {models['a']} holds" in said
    assert (tmp_path / "out" / "text_contract.json").read_text() == (models["a"] / "text_contract.json").read_text()


def test_shards_are_read_and_the_fingerprint_is_of_the_weights(models, tmp_path, capsys):
    """The same weights under another name and in shards are one model."""
    from transformers import AutoModel

    sharded = shutil.copytree(models["a"], tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    config = (sharded / "config.json").read_text()
    AutoModel.from_pretrained(models["a"]).save_pretrained(sharded, max_shard_size="30KB")
    (sharded / "config.json").write_text(config)
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    for name, model in (("one file", models["a"]), ("shards", sharded)):
        assert run(capsys, models["b"], model, tmp_path / name)[0] == 0
    one, other = (ModelCard.load(tmp_path / name / "README.md").text for name in ("one file", "shards"))
    rows = [[line for line in text.splitlines() if "| 0.5 |" in line][1] for text in (one, other)]
    assert rows[0].split("|")[3:] == rows[1].split("|")[3:], "the fingerprint"
    assert (tmp_path / "one file/model.safetensors").read_bytes() == (
        tmp_path / "shards/model.safetensors"
    ).read_bytes()
    code, said = run(capsys, models["a"], sharded, tmp_path / "same")
    assert code == 2 and f"{models['a']} and {sharded} hold the same weights, wanted different models" in said
    assert not (tmp_path / "same").exists() and not list(tmp_path.glob(".same*"))
    (sharded / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    next(sharded.glob("model-*.safetensors")).unlink(missing_ok=True)
    code, said = run(capsys, models["b"], sharded, tmp_path / "missing")
    assert code == 2 and "wanted every shard that it names" in said


def test_the_card_says_what_was_merged(models, tmp_path, capsys):
    """Licences and data: one licence of all stays, different ones are left to the reader."""
    bases = {}
    for name, licence in (("a", "mit"), ("b", "mit"), ("c", "apache-2.0")):
        bases[name] = shutil.copytree(models[name], tmp_path / name)
        base = tmp_path / f"base {name}"
        base.mkdir()
        (base / "README.md").write_text(f"---\nlicense: {licence}\nbase_model: org/{name}\n---\n")
        data = [{"name": f"set {name}", "rows": 7, "fingerprint": f"print-{name}"}]
        content = {"resolved": {"model_name_or_path": str(base)}, "flags": {}, "starts": [{"data sets": data}]}
        (bases[name] / "run.json").write_text(json.dumps(content))
    assert run(capsys, bases["a"], bases["b"], tmp_path / "alike", "--weights", 0.7, 0.3)[0] == 0
    card = ModelCard.load(tmp_path / "alike" / "README.md")
    assert card.data.license == "mit" and card.data.base_model == ["org/a", "org/b"]
    for line in ("| set a | 7 | `print-a` |", "| set b | 7 | `print-b` |"):
        assert line in card.text.splitlines()
    assert "After training: merged (average)." in card.text and "| `a` | 0.7 | `" in card.text
    assert card.text.count(" | mit |") == 2 and str(tmp_path) not in card.content
    assert run(capsys, bases["a"], bases["c"], tmp_path / "apart")[0] == 0
    card = ModelCard.load(tmp_path / "apart" / "README.md")
    assert card.data.license is None and "Licence: unknown" in card.text and "| apache-2.0 |" in card.text
    assert run(capsys, tmp_path / "alike", bases["c"], tmp_path / "again", "--method", "slerp")[0] == 0
    assert ModelCard.load(tmp_path / "again" / "README.md").data.base_model == ["org/a", "org/b", "org/c"]


# ---- what is refused


def change(folder: Path, name: str, **entries) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def other_token(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def layers(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    save_file({n: w for n, w in found.items() if not n.startswith("layers.1.")}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(folder, "config.json", num_hidden_layers=1, layer_types=config["layer_types"][:1])


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


def not_finite(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    found["norm.weight"][3] = torch.nan
    save_file(found, folder / "model.safetensors", {"format": "pt"})


SPOILED = {  # what is done to a copy of b -> what the line says
    "width": (lambda f: change(f, "config.json", hidden_size=64), "found hidden_size 64, wanted 32 as in "),
    "layers": (layers, "found num_hidden_layers 1, wanted 2 as in "),
    "rope": (lambda f: change(f, "config.json", rope_parameters={"rope_type": "default", "rope_theta": 77.0}), "rope_"),
    "attention": (lambda f: change(f, "config.json", is_causal=True), "found attn 'cc', wanted 'bb' as in "),
    "pooling": (lambda f: change(f, "text_contract.json", pooling_method="cls"), "found pooling_method 'cls', wanted"),
    "limit": (lambda f: change(f, "text_contract.json", query_max_len=7), "found query_max_len 7, wanted 40 as in "),
    "prompt": (
        lambda f: change(f, "text_contract.json", prompts={"query": "Q: "}),
        "found prompt 'query' 'Q: ', wanted 'Instruct",
    ),
    "contract": (lambda f: (f / "text_contract.json").write_text("{"), "text_contract.json: found no text contract"),
    "tokenizer": (other_token, "found another tokenizer than in "),
    "cut short": (cut, "model.safetensors: found "),
    "no weights": (lambda f: drop(f, "model.safetensors"), "found no weights, wanted model.safetensors"),
    "no tokenizer": (lambda f: drop(f, "tokenizer.json"), "found no tokenizer.json"),
    "half a checkpoint": (lambda f: (f / "trainer_state.json").write_text("{}"), "found no checkpoint.json there"),
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "found an adapter, wanted whole weights",
    ),
    "quantised": (lambda f: change(f, "config.json", quantization_config={"quant_method": "x"}), "not quantised"),
    "not finite": (not_finite, "found weight 'norm.weight' with a value that is not finite"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_models_that_do_not_fit_are_one_line(models, tmp_path, capsys, monkeypatch, name):
    spoil, wanted = SPOILED[name]
    folder = shutil.copytree(models["b"], tmp_path / "b")
    spoil(folder)
    if name != "not finite":
        monkeypatch.setattr(Model, "load", lambda *_: pytest.fail("a weight was read"))
    code, said = run(capsys, models["a"], folder, tmp_path / "out")
    assert code == 2 and len(said.splitlines()) == 1 and wanted in said, said
    assert str(folder) in said and "--model_name_or_path" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_another_architecture_or_projection_is_refused(models, qwen2, qwen3, tmp_path, capsys):
    code, said = run(capsys, models["a"], tuned(qwen2, tmp_path / "qwen2", 1), tmp_path / "out")
    assert code == 2 and "found model_type 'qwen2', wanted 'qwen3' as in " in said
    code, said = run(capsys, models["a"], tuned(qwen3, tmp_path / "dense", 1, projection=8), tmp_path / "out")
    assert code == 2 and "dense: found projection (8, " in said and "wanted (None, " in said
    code, said = run(capsys, qwen3, models["plain"], tmp_path / "out")
    assert code == 2 and "found no text_contract.json in " in said


FLAGS = {
    "alone": (["a"], "found one model, "),
    "twice": (["a", "b", "a/../a"], "twice, wanted different models"),
    "too few weights": (["a", "b", "--weights", "1"], "--weights: found 1, wanted 2 numbers"),
    "another sum": (["a", "b", "--weights", "0.5", "0.4"], "found 0.5 0.4 (sum 0.9), wanted numbers above 0"),
    "nan": (["a", "b", "--weights", "nan", "0.5"], "found nan 0.5"),
    "below zero": (["a", "b", "--weights", "1.5", "-0.5"], "found 1.5 -0.5"),
    "zero": (["a", "b", "--weights", "1", "0"], "found 1 0 (sum 1), wanted numbers above 0"),
    "no number": (["a", "b", "--weights", "half", "half"], "invalid float value: 'half'"),
    "no flag": (["a", "b", "--wieghts", "1"], "--wieghts"),
    "no method": (["a", "b", "--method", "ties"], "invalid choice: 'ties'"),
    "last of two": (["a", "b", "--last", "2"], "--last 2: found 2 models, wanted one run"),
    "last of one": (["a", "--last", "1"], "--last 1: found 1 models"),
    "last without saves": (["a", "--last", "3"], "found 0 saves in "),
    "no folder": (["a", "nowhere/at/all"], "found no such folder"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_do_not_fit_are_one_line(models, tmp_path, capsys, monkeypatch, name):
    words, wanted = FLAGS[name]
    monkeypatch.chdir(models["a"].parent)
    out = tmp_path / "out"
    flags = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    code, said = run(capsys, *words[:flags], out, *words[flags:])
    assert code == 2 and len(said.splitlines()) == 1 and wanted in said, said
    assert not out.exists()


def test_a_folder_that_exists_is_left_alone(models, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    code, said = run(capsys, models["a"], models["b"], tmp_path / "out")
    assert code == 2 and "out exists; nothing is overwritten" in said and not list((tmp_path / "out").iterdir())
