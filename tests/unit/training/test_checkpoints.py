"""Checkpoints come and go whole: what is cut off half-way is never seen under a checkpoint's name."""

from types import SimpleNamespace

import pytest

from gritlm.errors import UserError
from gritlm.training import checkpoints
from gritlm.training.checkpoints import MANIFEST, STAGING_FOLDER, find_damage, publish_checkpoint, rotate_checkpoints
from gritlm.training.run_folder import RUN_FILE, find_checkpoint, write_run_file


def save(run, step: int) -> None:
    aside = run / STAGING_FOLDER / f"checkpoint-{step}"
    aside.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt"):
        (aside / name).write_text(f"{name} of {step}")
    publish_checkpoint(aside, run / aside.name, {}, [])


def listed(run) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint-*"))


@pytest.mark.parametrize("limit, left", [(2, ["checkpoint-12", "checkpoint-9"]), (None, None), (0, None)])
def test_the_oldest_go_first(tmp_path, limit, left):
    for step in (2, 9, 12):
        save(tmp_path, step)
    rotate_checkpoints(tmp_path, limit)
    assert listed(tmp_path) == (left or ["checkpoint-12", "checkpoint-2", "checkpoint-9"])
    assert all(find_damage(tmp_path / name) == "" for name in listed(tmp_path))


@pytest.mark.parametrize("what", ["rotated", "written again"])
def test_cut_off_while_one_is_removed(tmp_path, what, monkeypatch):
    for step in (2, 4):
        save(tmp_path, step)

    def cut_off(folder, **kwargs):
        (folder / "optimizer.pt").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        if what == "rotated":
            rotate_checkpoints(tmp_path, 1)
        else:
            save(tmp_path, 2)
    assert listed(tmp_path) == ["checkpoint-4"]
    assert find_damage(tmp_path / "checkpoint-4") == ""
    assert "is missing" in find_damage(tmp_path / STAGING_FOLDER / "old-checkpoint-2"), "control: it was cut off"


@pytest.mark.parametrize("text", ["", '{"finished": fal'])
def test_a_damaged_run_file_is_one_error(tmp_path, text):
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    write_run_file(tmp_path, {"seed": 1}, finished=False)
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


@pytest.mark.parametrize("text", ["", "{}", '{"files": ', "[]", '{"files": 3}'])
def test_a_damaged_manifest_is_passed_over(tmp_path, text):
    save(tmp_path, 2)
    assert find_damage(tmp_path / "checkpoint-2") == "", "control"
    (tmp_path / "checkpoint-2" / MANIFEST).write_text(text)
    assert find_damage(tmp_path / "checkpoint-2").startswith("checkpoint.json is damaged")


@pytest.mark.parametrize("text", ["{}", "[]", '{"flags": 3, "finished": false}'])
def test_a_run_file_of_another_shape_is_one_error(tmp_path, text):
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(UserError, match=r"run\.json: found a damaged file"):
        find_checkpoint(args, {"seed": 1}, None)
