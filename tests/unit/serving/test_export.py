"""`gritlm export`: the folder it writes, and that it writes nothing where something is wrong."""

import importlib.util
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import INSTRUCTION, make_model_folder
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from gritlm import GritLM
from gritlm.errors import UserError
from gritlm.serving.export import export, main
from gritlm.serving.formats import CONVERTER, ExportOptions
from gritlm.serving.parity import prove
from gritlm.serving.probes import LIMITS, Reference, TrainedModel
from gritlm.training.checkpoints import MANIFEST, STAGING_FOLDER, publish_checkpoint

ONE = pytest.mark.parametrize("base", ["qwen3"], indirect=True)
TEXTS = ["river", "stone engine", "日本語", "def f(x):\n    return x"]
CONTRACT = {"query_max_len": 40, "passage_max_len": 48, "prompts": {"query": INSTRUCTION}}


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def base(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """A finished run's folder with a checkpoint in it, a log, and files as an older version wrote them."""
    run = tmp_path_factory.mktemp("run") / "out"
    make_model_folder(base, run, **CONTRACT)
    (run / "log.jsonl").write_text("")
    (run / "model.safetensors").chmod(0o600)
    staged = run / STAGING_FOLDER / "checkpoint-2"
    make_model_folder(base, staged, **CONTRACT)
    served = [str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file()]
    for name in ("rng_state_0", "optimizer", "scheduler"):
        shutil.copy(staged / "model.safetensors", staged / f"{name}.safetensors")
    (staged / "trainer_state.json").write_text("{}")
    publish_checkpoint(staged, run / "checkpoint-2", {"engine": "ddp", "ranks": 1, "flags": {}}, served)
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))
    return run


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_folder_is_the_model_and_nothing_else(run, tmp_path, capsys):
    before = GritLM(run).encode_queries(TEXTS)
    for source, out in ((run, tmp_path / "of the run"), (run / "checkpoint-2", tmp_path / "new" / "of a checkpoint")):
        assert main([str(source), str(out)]) == 0
        printed = capsys.readouterr().out
        assert "GritLM" in printed and "| one word | 1.000000 | 1.000000 | 1.000000 |" in printed
        assert "ONNX Runtime: not run" in printed and f"{out}: 10 files, " in printed
        card = (out / "README.md").read_text()
        assert "| one word | 1.000000 | 1.000000 | 1.000000 |" in card and "wanted at least 0.999999" in card
        assert np.abs(GritLM(out).encode_queries(TEXTS) - before).max() < 1e-6
        assert [path for path in listed(out) if path.startswith(("checkpoint", "run", "log", "optimizer", "rng"))] == []
        assert {oct(path.stat().st_mode & 0o777) for path in out.rglob("*") if path.is_file()} == {"0o644"}
        assert {oct(path.stat().st_mode & 0o777) for path in (out, *out.rglob("*")) if path.is_dir()} == {"0o755"}
        tokenizer = json.loads((out / "tokenizer.json").read_text())
        assert tokenizer["truncation"] is None and tokenizer["padding"] is None
        assert AutoTokenizer.from_pretrained(out).model_max_length == 48
        with pytest.raises(UserError, match="exists; nothing is overwritten"):
            main([str(run), str(out)])


@pytest.mark.parametrize(
    "base, dtype, stored, smallest",
    [("qwen2", "bfloat16", "BF16", 0.99), ("qwen3", "float16", "F16", 0.999)],
    ids=["bfloat16", "float16"],
    indirect=["base"],
)
def test_half_precision_and_shards(run, tmp_path, dtype, stored, smallest):
    rows = export(str(run), tmp_path / "out", ExportOptions(dtype=dtype, max_shard_size="30KB"))
    shards = sorted(path for path in tmp_path.glob("out/model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    for path in shards:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}  # noqa: SIM118
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    found = [row.result for row in rows if isinstance(row.result, float)]
    assert smallest < min(found) < 1 - 1e-9, "control: nothing was rounded"
    assert f"wanted at least {smallest}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("base, projection", [("qwen2", None), ("qwen3", 24)], indirect=["base"])
def test_truncated_vectors_are_a_real_slice_in_every_program(base, tmp_path, capsys, projection):
    model = make_model_folder(base, tmp_path / "model", projection=projection, **CONTRACT)
    model.config.matryoshka_dimensions = [4, 8, 32]
    model.config.save_pretrained(tmp_path / "model")
    whole = GritLM(tmp_path / "model").encode(TEXTS)
    command = [str(tmp_path / "model"), str(tmp_path / "out"), "--truncate_dim"]
    assert main([*command, "7"]) == 0
    assert "--truncate_dim 7: the model was not trained for it" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    assert main([*command, "8"]) == 0
    assert "not trained for" not in capsys.readouterr().out
    wanted = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    assert np.abs(GritLM(tmp_path / "out").encode(TEXTS) - wanted).max() < 1e-5
    served = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert np.abs(served.encode_document(TEXTS) - wanted).max() < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["matryoshka_dimensions"] == [4, 8]
    for found in ("0", "32", "64"):
        with pytest.raises(UserError, match=f"--truncate_dim: found {found}, wanted "):
            main([str(tmp_path / "model"), str(tmp_path / "bad"), "--truncate_dim", found])


@ONE
def test_a_fault_leaves_nothing(run, tmp_path):
    def plant(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"is_causal": True}))

    with pytest.raises(UserError, match=r"out: other vectors than the trainer's: causality: .*; nothing was written$"):
        export(str(run), tmp_path / "out", ExportOptions(), written=plant)
    assert list(tmp_path.iterdir()) == []


@ONE
def test_no_fault_hides_in_half_precision(run, tmp_path, monkeypatch):
    """A change whose vectors are nearer to the trainer's than bfloat16 has to be."""

    def plant(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] *= 1.02
        (folder / "config.json").write_text(json.dumps(config))
        assert prove(folder, Reference(TrainedModel(str(run), "cpu")), "bfloat16"), "control: it would pass"

    with pytest.raises(UserError, match="other vectors than the trainer's: rope: found "):
        export(str(run), tmp_path / "out", ExportOptions(dtype="bfloat16"), written=plant)
    monkeypatch.setitem(LIMITS, "bfloat16", LIMITS["float32"])
    with pytest.raises(UserError, match=r"dtype: bfloat16 moves them too far \(GritLM, .*; such as .*: cosine 0.99"):
        export(str(run), tmp_path / "out", ExportOptions(dtype="bfloat16"))
    assert list(tmp_path.iterdir()) == []


def copy_of_checkpoint(run: Path, target: Path) -> Path:
    return shutil.copytree(run / "checkpoint-2", target / "checkpoint-2")


def cut_short(run: Path, target: Path) -> Path:
    folder = copy_of_checkpoint(run, target)
    os.truncate(folder / "model.safetensors", 1000)
    return folder


def without(name: str):
    def make(run: Path, target: Path) -> Path:
        folder = copy_of_checkpoint(run, target)
        (folder / name).unlink()
        return folder

    return make


def manifest(text: str):
    def make(run: Path, target: Path) -> Path:
        folder = copy_of_checkpoint(run, target)
        (folder / MANIFEST).write_text(text)
        return folder

    return make


def unfinished(run: Path, target: Path) -> Path:
    folder = copy_of_checkpoint(run, target).parent
    (folder / "run.json").write_text('{"finished": false}')
    return folder


def empty(run: Path, target: Path) -> Path:
    (target / "empty").mkdir()
    return target / "empty"


BAD = {
    "no such folder": (lambda run, target: target / "missing", "found no such folder, wanted a model folder"),
    "a file": (lambda run, target: run / "config.json", "found no such folder, wanted a model folder"),
    "an empty folder": (empty, "found no text_contract.json, wanted a folder made by gritlm train"),
    "cut short": (cut_short, "model.safetensors is cut short: found 1000 bytes"),
    "a file is missing": (without("tokenizer.json"), "tokenizer.json is missing, wanted a whole checkpoint"),
    "no list of files": (without(MANIFEST), f"found no {MANIFEST} there, wanted a whole checkpoint"),
    "half a list": (manifest('{"files": {}, "served": ["a"]}'), "is damaged"),
    "no JSON": (manifest("{"), "cannot be read"),
    "a run that goes on": (unfinished, "a run that is not finished, wanted a model; export .*checkpoint-2"),
}


@ONE
def test_the_optimizer_is_not_needed(run, tmp_path):
    assert export(str(without("optimizer.safetensors")(run, tmp_path)), tmp_path / "out", ExportOptions())


@ONE
@pytest.mark.parametrize("what", BAD)
def test_what_is_no_whole_model_is_refused(run, tmp_path, what):
    make, said = BAD[what]
    (tmp_path / "source").mkdir()
    with pytest.raises(UserError, match=said) as caught:
        main([str(make(run, tmp_path / "source")), str(tmp_path / "out")])
    assert "--model_name_or_path" not in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@ONE
def test_a_bare_base_is_refused(base, tmp_path):
    with pytest.raises(UserError, match=r"found no text_contract.json, wanted a folder made by gritlm train"):
        main([str(base), str(tmp_path / "out")])


FLAGS = {
    "--max_shard_size 5": "found '5', wanted a size such as 5GB",
    "--max_shard_size 0GB": "found '0GB', wanted a size",
    "--device gpu": "found 'gpu', wanted cpu or cuda",
    **({} if torch.cuda.is_available() else {"--device cuda": "found 'cuda', wanted cpu or cuda"}),
    "--gguf": "--gguf and --llama_cpp DIR: found one without the other",
    "--llama_cpp .": "--gguf and --llama_cpp DIR: found one without the other",
    "--gguf --llama_cpp .": f"--llama_cpp .: found no {CONVERTER} there",
    "--dry_run": "--dry_run: found no --push_to_hub NAME",
    "--push_to_hub a/b/c": "found 'a/b/c', wanted a name of the hub",
    "--push_to_hub me/mine": "found no login, wanted one: hf auth login, or HF_TOKEN",
    "--dtype int8": "invalid choice: 'int8'",
    "--license Apache": "--license: found 'Apache', wanted the hub's name of a licence",
    "--language English": "--language: found 'English', wanted a code such as en",
    "--datasets a/b/c": "--datasets: found 'a/b/c', wanted a name of the hub",
    "--results none.json": "none.json",
}


@ONE
@pytest.mark.parametrize("flags", FLAGS)
def test_flags_that_do_not_fit_are_refused(run, tmp_path, monkeypatch, flags):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError) as caught:
        main([str(run), str(tmp_path / "out"), *flags.split()])
    assert FLAGS[flags] in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@ONE
def test_float16_that_overflows_is_refused(base, tmp_path):
    make_model_folder(base, tmp_path / "model", **CONTRACT)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["norm.weight"][0] = 1e6
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--dtype float16: weight 'norm.weight' holds larger values"):
        main([str(tmp_path / "model"), str(tmp_path / "out"), "--dtype", "float16"])


@ONE
def test_a_disk_that_fills_leaves_nothing(run, tmp_path):
    """The system refuses to write beyond a size, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"out could not be written \(.*os error 27.*; .* are free there\)"):
            export(str(run), tmp_path / "out", ExportOptions())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


# It takes the command line of llama.cpp's converter. scripts/serving_check.sh runs the converter.
STAND_IN = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
for flag in ("--outfile", "--outtype", "--model-name", "--metadata"):
    parser.add_argument(flag)
found = parser.parse_args()
assert (found.model / "config.json").is_file()
names = json.loads(pathlib.Path(found.metadata).read_text())
pathlib.Path(found.outfile).write_text(json.dumps([found.outtype, found.model_name, names]))
"""


@ONE
def test_the_converter_of_llama_cpp_is_run(run, base, tmp_path, capsys):
    out, llama_cpp = tmp_path / "out", tmp_path / "llama.cpp"
    llama_cpp.mkdir()
    gguf = ["--gguf", "--llama_cpp", str(llama_cpp)]
    (llama_cpp / CONVERTER).write_text("raise NotImplementedError('Architecture not supported')")
    with pytest.raises(UserError, match=r"--gguf: .*convert_hf_to_gguf.py failed: NotImplementedError: Architecture"):
        main([str(run), str(out), *gguf])
    assert not out.exists()
    (llama_cpp / CONVERTER).write_text(STAND_IN)
    assert main([str(run), str(out), *gguf, "--dtype", "bfloat16"]) == 0
    kind, name, names = json.loads((out / "out-bf16.gguf").read_text())
    assert (kind, name, names["general.name"], names["general.finetune"]) == ("bf16", "out", "out", None)
    assert "llama.cpp: not run: it pools the prompt" in capsys.readouterr().out
    make_model_folder(base, tmp_path / "projected", projection=16, **CONTRACT)
    for source, more, said in (
        (run, ["--truncate_dim", "8"], "found --truncate_dim, which becomes a projection"),
        (tmp_path / "projected", [], "found a model with a projection"),
    ):
        with pytest.raises(UserError, match=f"--gguf: {said}, wanted .*: llama.cpp leaves it out silently"):
            main([str(source), str(tmp_path / "bad"), *gguf, *more])


@ONE
def test_a_dry_run_shows_what_would_go_up(run, tmp_path, capsys, monkeypatch):
    command = [str(run), str(tmp_path / "out"), "--push_to_hub", "me/mine"]
    assert main([*command, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "would be uploaded to https://huggingface.co/me/mine:" in printed
    assert all(f"  {name}  " in printed for name in listed(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").read_text() in printed
    assert 'SentenceTransformer("me/mine")' in printed
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(UserError, match=r"--push_to_hub me/mine: .*offline mode.*; .*out is whole: hf upload me/mine"):
        main(command)
    assert (tmp_path / "out" / "modules.json").is_file()


@ONE
def test_the_card_says_what_the_flags_say(run, tmp_path):
    form = {"width": 8, "precision": "int8", "bytes": 8, "metrics": {"ndcg@10": 0.25}}
    row = {"name": "own", "kind": "retrieval", "main": "ndcg@10", "metrics": {"ndcg@10": 0.5}, "values": [0.4, 0.6]}
    row["compressed"] = [form | {"metrics of float32 queries": {"ndcg@10": 0.375}}]
    content = {"format": 1, "about": {"model": {"name": str(run)}}, "sets": [row]}
    results = tmp_path / "own.json"
    results.write_text(json.dumps(content))
    more = ["--license", "mit", "--language", "en", "zh-Hant", "--datasets", "me/pairs", "--results", str(results)]
    assert main([str(run), str(tmp_path / "out"), *more]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", ["en", "zh-Hant"], ["me/pairs"])
    assert "| own | ndcg@10 | unknown | 0.500 | unknown | 2 |" in card.text
    assert "| own | 8 | int8 | 8 | 0.250 | 0.375 |" in card.text and "- Licence: mit." in card.text
    assert card.data.eval_results[0].metric_value == 0.5
    results.write_text(json.dumps(content | {"about": {"model": {"name": "other"}}}))
    with pytest.raises(UserError, match=r"--results .*own.json: found results of other, wanted those of "):
        main([str(run), str(tmp_path / "bad"), *more])
    assert not (tmp_path / "bad").exists()


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="onnx and onnxscript are not installed")
def test_onnx(run, tmp_path):
    rows = export(str(run), tmp_path / "out", ExportOptions(onnx=True, dtype="float32"))
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()
    found = {row.what: row.result for row in rows if row.consumer == "ONNX Runtime"}
    if importlib.util.find_spec("onnxruntime") is None:
        assert found == {"all": "not run: onnxruntime is not installed"}
    else:
        assert min(result for result in found.values() if isinstance(result, float)) > 0.999999


@ONE
def test_onnx_that_is_not_installed_is_said(run, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find_spec(name))
    with pytest.raises(UserError, match=r"--onnx: onnx is not installed; pip install 'gritlm\[onnx\]'"):
        main([str(run), str(tmp_path / "out"), "--onnx"])
