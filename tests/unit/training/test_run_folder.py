"""The output folder: it holds an unfinished run of the same flags, or it is refused and left as it is."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import train_flags, write_jsonl
from safetensors.torch import save_file

from gritlm import __version__
from gritlm.data.records import load_records
from gritlm.errors import UserError
from gritlm.training.checkpoints import FORMAT, MANIFEST, differing, find_damage
from gritlm.training.flag_checks import parse
from gritlm.training.run_folder import (
    RUN_FILE,
    find_checkpoint,
    go_back_to,
    run_settings_of,
    update_run_file,
    write_run_file,
)


@pytest.mark.parametrize("text", ["", '{"finished": fal'])
def test_a_damaged_run_file_is_one_error(tmp_path, text):
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    write_run_file(tmp_path, {"seed": 1}, {}, {})
    assert find_checkpoint(args, {"seed": 1}, None) == (None, []), "control: a whole one"
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(UserError, match=r"run\.json: found a damaged file"):
        find_checkpoint(args, {"seed": 1}, None)


def test_cut_off_while_the_run_file_is_written(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    (tmp_path / f".{RUN_FILE}.0123abcd.part").write_text("{")
    assert find_checkpoint(args, {"seed": 1}, None) == (None, [])
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match="is not empty and holds no run of ours"):
        find_checkpoint(args, {"seed": 1}, None)


@pytest.mark.parametrize("text", ["{}", "[]", '{"flags": 3, "finished": false}'])
def test_a_run_file_of_another_shape_is_one_error(tmp_path, text):
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(UserError, match=r"run\.json: found a damaged file"):
        find_checkpoint(args, {"seed": 1}, None)


def test_a_run_of_another_version(tmp_path):
    """One of 0.1.0 carries no version, and lacks newer flags; a newer one may have a form that is not known here."""
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    old = {"finished": False, "flags": {"seed": 1}}
    (tmp_path / RUN_FILE).write_text(json.dumps(old))
    assert find_checkpoint(args, {"seed": 1, "same_tower": False}, None) == (None, [])
    with pytest.raises(UserError, match=r"same_tower was False, now True \(written by gritlm 0\.1\.0, this is "):
        find_checkpoint(args, {"seed": 1, "same_tower": True}, None)
    (tmp_path / RUN_FILE).write_text(json.dumps(old | {"format": FORMAT + 1, "version": "9.9"}))
    with pytest.raises(
        UserError, match=rf"found format {FORMAT + 1}, wanted at most {FORMAT} \(written by gritlm 9\.9"
    ):
        find_checkpoint(args, {"seed": 1}, None)
    write_run_file(tmp_path, {"seed": 1}, {}, {})
    found = json.loads((tmp_path / RUN_FILE).read_text())
    assert (found["format"], found["version"]) == (FORMAT, __version__)


def save(folder, step: int) -> str:
    """A checkpoint as far as the output folder looks at it."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    needed = ("model.safetensors", "optimizer.safetensors", "scheduler.safetensors", "rng_state_0.safetensors")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in needed:
        save_file({"step": torch.tensor(step)}, path / name)
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    manifest = {"format": FORMAT, "engine": "ddp", "ranks": 1, "flags": {"seed": 1}, "served": [], "files": sizes}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return str(path)


def test_a_named_checkpoint_is_what_the_user_gets(tmp_path):
    """Newer ones are moved away, so that the start after a kill does not go on from them."""
    folder = tmp_path / "run"
    four, six = save(folder, 4), save(folder, 6)
    write_run_file(folder, {"seed": 1}, {}, {})
    named = SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=four, world_size=1)
    plain = SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=None, world_size=1)
    assert find_checkpoint(plain, {"seed": 1}, "ddp") == (six, []), "control"
    assert find_checkpoint(named, {"seed": 1}, "ddp") == (four, [])
    (line,) = go_back_to(four, folder)
    assert line == f"--resume_from_checkpoint {four}: moved checkpoint-6 to {folder / 'set-aside-1'}"
    assert find_checkpoint(plain, {"seed": 1}, "ddp") == (four, [])
    assert find_damage(folder / "set-aside-1" / "checkpoint-6") == ""
    assert go_back_to(four, folder) == []
    five = save(folder, 5)
    assert find_checkpoint(named, {"seed": 1}, "ddp") == (five, []), "the same command after a kill goes on"
    other = SimpleNamespace(**vars(plain) | {"resume_from_checkpoint": str(folder / "set-aside-1" / "checkpoint-6")})
    write_run_file(folder, {"seed": 1}, {}, {})
    assert find_checkpoint(other, {"seed": 1}, "ddp")[0] == other.resume_from_checkpoint
    assert find_checkpoint(named, {"seed": 1}, "ddp") == (five, []), "a new start has kept what the folder knew"


def test_true_is_no_checkpoint_folder(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint="True")
    with pytest.raises(UserError, match="found True, wanted a checkpoint folder; leave it out"):
        find_checkpoint(args, {}, None)


def test_a_finished_run_says_how_to_go_on(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    settings = {"seed": 1, "num_train_epochs": 1.0, "max_steps": -1}
    write_run_file(tmp_path, settings, {}, {})
    update_run_file(tmp_path, finished=True)
    further = rf"to train its model further: --model_name_or_path {tmp_path} --output_dir NEW"
    for now in (settings, settings | {"num_train_epochs": 2.0}, settings | {"max_steps": 9}):
        with pytest.raises(UserError, match=further):
            find_checkpoint(args, now, None)
    with pytest.raises(UserError, match=r"seed was 1, now 2; nothing is overwritten, name another folder$"):
        find_checkpoint(args, settings | {"seed": 2}, None)


def test_a_run_goes_on_with_the_same_rows_under_another_spelling_and_with_no_others(qwen3, tmp_path, monkeypatch):
    home, data = tmp_path / "home", tmp_path / "home" / "data" / "a.jsonl"
    data.parent.mkdir(parents=True)
    write_jsonl(data, rows=16, negatives=0, seed=1)
    (tmp_path / "link.jsonl").symlink_to(data)
    (tmp_path / "linked").symlink_to(data.parent)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)

    def settings(train_data: str, model: str = str(qwen3)) -> dict:
        run = parse(train_flags(model, train_data, tmp_path / "out", tmp_path / "cache"))
        return run_settings_of(run, load_records(run.data.train_data, run.data.data_cache), 1)

    first = settings(str(data))
    for spelled in ("~/data/a.jsonl", "data/a.jsonl", "data/", "~/data", "../linked", str(tmp_path / "link.jsonl")):
        assert differing(first, settings(spelled)) == "", spelled
    relative = os.path.relpath(qwen3)
    assert differing(first, settings(str(data), f"{relative}/")) == ""
    base = Path(shutil.copytree(qwen3, tmp_path / "base"))
    before = settings(str(data), str(base))
    config = (base / "config.json").read_text(encoding="utf-8")
    (base / "config.json").write_text(config.replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    assert differing(before, settings(str(data), str(base))).startswith("base's config and tokenizer was ")
    times = data.stat()
    data.write_text(data.read_text(encoding="utf-8").replace("river", "RIVER"), encoding="utf-8")
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert data.stat().st_size == times.st_size
    assert differing(first, settings(str(data))).startswith("data was ['16 rows, ")
