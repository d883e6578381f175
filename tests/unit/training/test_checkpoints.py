"""Checkpoints come and go whole: what is cut off half-way is never seen under a checkpoint's name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from gritlm import __version__
from gritlm.errors import UserError
from gritlm.training import checkpoints
from gritlm.training.checkpoints import (
    FORMAT,
    MANIFEST,
    STAGING_FOLDER,
    explain_unsaved,
    find_damage,
    publish_checkpoint,
    rotate_checkpoints,
    why_not_resumable,
)

HEADER: dict = {"engine": "ddp", "ranks": 1, "flags": {}}
OF_EVERY_ENGINE = ("model.safetensors", "trainer_state.json", "rng_state_0.safetensors")
FILES = {
    "ddp": (*OF_EVERY_ENGINE, "optimizer.safetensors", "scheduler.safetensors"),
    "fsdp2": (
        *(*OF_EVERY_ENGINE, "scheduler.pt", "optimizer_0/.metadata", "optimizer_0/__0_0.distcp"),
        *("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"),
    ),
    "zero2": (
        *(*OF_EVERY_ENGINE, "latest", "global_step2/mp_rank_00_model_states.pt"),
        "global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ),
    "zero3": (
        *(*OF_EVERY_ENGINE, "latest", "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt"),
        "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ),
}


def save(run, step: int, files=FILES["ddp"], **header) -> None:
    aside = run / STAGING_FOLDER / f"checkpoint-{step}"
    for name in files:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"step": torch.tensor(step)}, aside / name)
        else:
            (aside / name).write_text(json.dumps({"global_step": step}))
    publish_checkpoint(aside, run / aside.name, HEADER | header, [])


def listed(run) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint-*"))


@pytest.mark.parametrize("limit, left", [(2, ["checkpoint-12", "checkpoint-9"]), (None, None), (0, None)])
def test_the_oldest_go_first(tmp_path, limit, left):
    for step in (2, 9, 12):
        save(tmp_path, step)
    rotate_checkpoints(tmp_path, limit)
    assert listed(tmp_path) == (left or ["checkpoint-12", "checkpoint-2", "checkpoint-9"])
    assert all(find_damage(tmp_path / name) == "" for name in listed(tmp_path))


@pytest.mark.parametrize("limit, best, left", [(1, 2, {2, 12}), (2, 2, {2, 12}), (2, 9, {9, 12}), (2, 7, {9, 12})])
def test_the_best_one_stays(tmp_path, limit, best, left):
    for step in (2, 9, 12):
        save(tmp_path, step)
    rotate_checkpoints(tmp_path, limit, best)
    assert set(listed(tmp_path)) == {f"checkpoint-{step}" for step in left}


@pytest.mark.parametrize("what", ["rotated", "written again"])
def test_cut_off_while_one_is_removed(tmp_path, what, monkeypatch):
    for step in (2, 4):
        save(tmp_path, step)

    def cut_off(folder, **kwargs):
        (folder / "optimizer.safetensors").unlink()
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


@pytest.mark.parametrize("engine", FILES)
def test_what_an_engine_needs_is_there_or_nothing_is_published(tmp_path, engine):
    save(tmp_path, 2, FILES[engine], engine=engine)
    assert find_damage(tmp_path / "checkpoint-2") == ""
    for name in FILES[engine]:
        with pytest.raises(UserError, match=r"checkpoint-9: .* is missing before the checkpoint is complete"):
            save(tmp_path, 9, [other for other in FILES[engine] if other != name], engine=engine)
        shutil.rmtree(tmp_path / STAGING_FOLDER)
    assert listed(tmp_path) == ["checkpoint-2"]
    with pytest.raises(UserError, match=r"rng_state_1\.safetensors is missing"):
        save(tmp_path, 9, FILES[engine], engine=engine, ranks=2)


@pytest.mark.parametrize("name", FILES["ddp"])
def test_lost_bytes_under_the_same_size(tmp_path, name):
    save(tmp_path, 2)
    path = tmp_path / "checkpoint-2" / name
    path.write_bytes(bytes(path.stat().st_size))
    assert find_damage(path.parent).startswith(f"{name} is damaged (")


def test_a_manifest_that_lists_too_little(tmp_path):
    save(tmp_path, 2)
    path = tmp_path / "checkpoint-2" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["files"]["optimizer.safetensors"]
    path.write_text(json.dumps(manifest))
    assert find_damage(path.parent) == "it holds no optimizer.safetensors"


@pytest.mark.parametrize("text", ["", "{}", '{"files": ', "[]", '{"files": 3}'])
def test_a_damaged_manifest_is_passed_over(tmp_path, text):
    save(tmp_path, 2)
    assert find_damage(tmp_path / "checkpoint-2") == "", "control"
    (tmp_path / "checkpoint-2" / MANIFEST).write_text(text)
    assert find_damage(tmp_path / "checkpoint-2").startswith("checkpoint.json is damaged")


def test_a_checkpoint_of_another_version(tmp_path):
    """Checkpoints before format 2 hold pickles. A flag that a checkpoint lacks counts as its default."""
    save(tmp_path, 2)
    path = tmp_path / "checkpoint-2" / MANIFEST
    manifest = json.loads(path.read_text())
    assert (manifest["format"], manifest["version"]) == (FORMAT, __version__)
    old = {"engine": "ddp", "ranks": 1, "flags": {"seed": 1}, "files": manifest["files"]}
    path.write_text(json.dumps(old))
    assert find_damage(path.parent) == ""
    before = why_not_resumable(path.parent, {"seed": 1}, "ddp", 1)
    assert before.startswith(f"its format is 0, wanted {FORMAT} (written by gritlm 0.1.0")
    old |= {"format": FORMAT, "version": "0.2.9"}
    path.write_text(json.dumps(old))
    settings = {"seed": 1, "same_tower": False}
    assert why_not_resumable(path.parent, settings, "ddp", 2) == ""
    changed = why_not_resumable(path.parent, settings | {"same_tower": True}, "ddp", 2)
    assert (
        changed
        == f"it is of another run: same_tower was False, now True (written by gritlm 0.2.9, this is {__version__})"
    )
    path.write_text(json.dumps(old | {"format": FORMAT + 1, "version": "9.9"}))
    newer = why_not_resumable(path.parent, settings, "ddp", 2)
    assert f"found format {FORMAT + 1}, wanted at most {FORMAT} (written by gritlm 9.9" in newer


def test_engines_and_ranks_that_cannot_resume(tmp_path):
    save(tmp_path, 2)
    path = tmp_path / "checkpoint-2" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"engine": "zero2", "ranks": 2, "flags": {}}))
    assert why_not_resumable(path.parent, {}, "zero2", 2) == ""
    assert "DeepSpeed wrote it on 2 ranks and cannot resume it on 4" in why_not_resumable(path.parent, {}, "zero2", 4)
    assert "written by the engine zero2, this run has fsdp2" in why_not_resumable(path.parent, {}, "fsdp2", 2)


def test_a_full_disk_under_the_tokenizer_is_explained(tmp_path):
    """tokenizers has no class for it."""
    with pytest.raises(Exception, match="No space left on device") as caught:
        Tokenizer(models.BPE()).save("/dev/full")
    with pytest.raises(UserError, match=r"could not be written .*No space left on device.*make room"):
        explain_unsaved(caught.value, tmp_path, "checkpoint-2")
    explain_unsaved(ValueError("control: another error goes on"), tmp_path, "checkpoint-2")
