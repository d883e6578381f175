"""Checkpoints come and go whole: what is cut off half-way is never seen under a checkpoint's name."""

import pytest

from gritlm import run_folder
from gritlm.run_folder import UNFINISHED, damage, publish_checkpoint, rotate_checkpoints


def save(run, step: int) -> None:
    aside = run / UNFINISHED / f"checkpoint-{step}"
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
    assert all(damage(tmp_path / name) == "" for name in listed(tmp_path))


@pytest.mark.parametrize("what", ["rotated", "written again"])
def test_cut_off_while_one_is_removed(tmp_path, what, monkeypatch):
    for step in (2, 4):
        save(tmp_path, step)

    def cut_off(folder, **kwargs):
        (folder / "optimizer.pt").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder.shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        if what == "rotated":
            rotate_checkpoints(tmp_path, 1)
        else:
            save(tmp_path, 2)
    assert listed(tmp_path) == ["checkpoint-4"]
    assert damage(tmp_path / "checkpoint-4") == ""
    assert "is missing" in damage(tmp_path / UNFINISHED / "old-checkpoint-2"), "control: it was cut off"
