"""Flags from a FILE.json, and run.json: what it holds, and that a run started from it is the same run, bit for bit."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import run, train_flags
from safetensors.torch import load_file

from gritlm.cli import run_verb
from gritlm.errors import UserError
from gritlm.training import plan
from gritlm.training.arguments import GROUPS, Command
from gritlm.training.flag_checks import parse
from gritlm.training.flag_parser import make_parser
from gritlm.training.provenance import unlike
from gritlm.training.run_folder import update_run_file, write_run_file


def parsed(*words: str):
    parser = make_parser("train", GROUPS, "")
    return parser.parse_args(list(words)), parser.command


def write(path, text) -> str:
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return str(path)


def test_a_file_of_flags(tmp_path):
    """Each kind of value; later flags win; nothing else has changed."""
    content = {
        "seed": 7,
        "temperature": 0.5,
        "bf16": True,
        "normalized": False,
        "output_dir": "relative/out",
        "query_prompt": "-- a prompt with spaces",
        "report_to": ["tensorboard", "wandb"],
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "save_total_limit": None,
        "train-group-size": 2,
    }
    found, command = parsed(write(tmp_path / "flags.json", content), "--temperature", "0.1", "--save_steps=5")
    plain, _ = parsed()
    wanted = content | {"train_group_size": 2, "report_to": "tensorboard,wandb", "temperature": 0.1, "save_steps": 5.0}
    wanted |= {"lr_scheduler_kwargs": '{"num_cycles": 2}'}
    del wanted["train-group-size"]
    assert vars(found) == vars(plain) | wanted
    assert command.given == {name: value for name, value in wanted.items() if name != "save_total_limit"}
    assert parsed()[0].save_total_limit == 2, "a null counts for the one command line"


WRONG = {
    "an unknown key": ({"temprature": 1}, r"flags\.json: --temprature: no such flag; the nearest is --temperature"),
    "an old flag": ({"gc_chunk_size": 8}, r"flags\.json: --gc_chunk_size: no such flag here; use --chunk_tokens"),
    "no JSON": ("{", r"flags\.json: no JSON"),
    "no object": ("[1]", r"flags\.json: found list, wanted a JSON object of flags"),
    "a key twice": ('{"seed": 1, "seed": 2}', r"flags\.json: no JSON: key 'seed' given twice"),
    "a wrong type": ({"seed": "x"}, "--seed: invalid int value: 'x'"),
    "a fraction": ({"max_steps": 1e3}, "max-steps: invalid int value: '1000.0'"),
    "a null": ({"seed": None}, r"flags\.json: seed: found null, wanted a value"),
    "no number": ('{"temperature": NaN}', "--temperature: found nan, wanted a number above 0"),
    "an old run.json": (
        {"format": 1, "version": "0.2.0", "flags": {}},
        "run.json of gritlm 0.2.0, which does not hold",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line(tmp_path, name):
    content, message = WRONG[name]
    with pytest.raises(UserError, match=message) as error:
        parse([write(tmp_path / "flags.json", content)])
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_not_first(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: No such file"):
        parse(["absent.json"])
    with pytest.raises(UserError, match=r"found 'flags\.json' where no value is wanted"):
        parse(["--seed", "1", "flags.json"])


def test_a_plan_from_a_file(qwen3, data, tmp_path, capsys, monkeypatch):
    """Relative paths are the caller's, not the file's."""
    words = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache")
    flags = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(data, tmp_path / "rows")
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "elsewhere" / "flags.json", flags | {"train_data": "rows", "max_steps": 3})
    assert run_verb(plan.main, [file, "--batches", "1"]) == 0
    assert "3 steps in all" in capsys.readouterr().out


# ---- run.json


def test_a_run_is_repeated_from_its_run_file(qwen3_dropout, data, tmp_path):
    """Bit for bit, from another folder; another seed gives another run. run.json holds what that needs, no secret."""
    shutil.copytree(data, tmp_path / "rows")
    flags = train_flags(qwen3_dropout, "rows", "out", "cache", max_steps=3, save_strategy="no", seed=5)
    for words, folder in (
        ([*flags, "--learning_rate", "2e-3"], tmp_path),
        ([tmp_path / "out/run.json", "--output_dir", tmp_path / "again"], tmp_path / "rows"),
        ([tmp_path / "out/run.json", "--output_dir", tmp_path / "other", "--seed", 6], tmp_path),
    ):
        done = run("-m", "gritlm", "train", *words, cwd=folder, WANDB_API_KEY="a secret", NCCL_DEBUG="WARN")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "not the same run" not in done.stdout
    first, again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again", "other"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first), "control"

    found, repeated = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("out", "again"))
    assert list(found)[:6] == ["format", "version", "finished", "starts", "flags", "resolved"]
    assert repeated["flags"] == found["flags"]
    (start,) = found["starts"]
    assert start["command"].startswith("gritlm train --model_name_or_path ") and start["ranks"] == 1
    assert start["given"]["learning_rate"] == 2e-3 and "temperature" not in start["given"]
    assert repeated["starts"][0]["given"] == {"output_dir": str(tmp_path / "again")}
    assert {"gritlm", "python", "torch", "transformers", "accelerate", "datasets", "numpy"} <= start["versions"].keys()
    assert start["device"] == "CPU" and start["host"]
    assert start["environment"]["NCCL_DEBUG"] == "WARN" and "a secret" not in json.dumps(found)
    assert "learning_rate" in found["flags"] and "save_steps" not in found["flags"], "which flags are fixed"
    resolved = found["resolved"]
    assert (resolved["temperature"], resolved["attn"], resolved["save_steps"]) == (0.02, "bb", 3.0)
    assert resolved["train_data"] == str(tmp_path / "rows") and resolved["projection"] == 0


def test_what_keeps_a_run_from_being_repeated_is_said():
    before = {"flags": {"data": ["24 rows, abc"]}, "starts": [{"ranks": 2}, {"ranks": 1}]}

    def said(*words: str, data: str = "24 rows, abc", ranks: int = 1, repeats: dict = before) -> list[str]:
        command = Command(["run.json", *words], repeats=repeats)
        run = SimpleNamespace(command=command, training=SimpleNamespace(world_size=ranks))
        return unlike(run, {"data": [data]})

    assert said() == said(data="25 rows, def", repeats={}) == []
    (line,) = said(data="25 rows, def")
    assert line.startswith("run.json: this is not the same run: data was ")
    assert said("--train_data", "more", data="25 rows, def") == [], "asked for"
    assert said(ranks=4) == ["run.json: that run had 1 ranks, this one has 4; its sums are rounded differently"]


def test_a_later_start_is_added(tmp_path):
    """With what differs from the first; a run.json of an older version gets its first start."""
    first = {"time": "1", "command": "gritlm train", "ranks": 2, "versions": {"torch": "2.13"}}
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "version": "0.2.0", "finished": False, "flags": {}}))
    write_run_file(tmp_path, {"seed": 1}, {"seed": 1}, first)
    write_run_file(tmp_path, {"seed": 1}, {"seed": 1}, first | {"time": "2", "ranks": 1})
    update_run_file(tmp_path, wandb="id")
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["starts"] == [first, {"time": "2", "ranks": 1}]
    assert (found["finished"], found["resolved"], found["wandb"]) == (False, {"seed": 1}, "id")
