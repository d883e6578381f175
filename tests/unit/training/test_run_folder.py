"""The output folder: it holds an unfinished run of the same flags, or it is refused and left as it is."""

import json
from types import SimpleNamespace

import pytest

from gritlm import __version__
from gritlm.errors import UserError
from gritlm.training.checkpoints import FORMAT
from gritlm.training.run_folder import RUN_FILE, find_checkpoint, write_run_file


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
    write_run_file(tmp_path, {"seed": 1}, finished=False)
    found = json.loads((tmp_path / RUN_FILE).read_text())
    assert (found["format"], found["version"]) == (FORMAT, __version__)
