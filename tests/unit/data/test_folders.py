"""The files of a data set: all that are there are read, or one line names what is not."""

import gzip
import json
import os
import tempfile
from pathlib import Path

import pytest

from gritlm.data.folders import describe_folder, find_files
from gritlm.data.rows import read_blocks
from gritlm.errors import UserError

GOOD = {"query": ["Instruct: x\nQuery: ", "what"], "pos": ["this"], "neg": []}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_hidden_files_are_skipped_and_a_data_set_has_one_file_or_folder(tmp_path):
    write(tmp_path / "a.jsonl", GOOD)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    write(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.jsonl", GOOD)
    (tmp_path / "b" / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("1.jsonl", "._1.jsonl", ".ipynb_checkpoints/1-checkpoint.jsonl"):
        write(tmp_path / "b" / name, GOOD)
    assert find_files(tmp_path) == {"a": [tmp_path / "a.jsonl"], "b": [tmp_path / "b" / "1.jsonl"]}
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: found a second data set 'a'"):
        find_files(tmp_path)


def test_linked_files_and_folders_are_read_at_any_depth(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    own = write(data / "a" / "deep" / "1.jsonl", GOOD)
    write(elsewhere / "more" / "2.jsonl", GOOD)
    write(elsewhere / "3.jsonl", GOOD)
    (data / "a" / "linked").symlink_to(elsewhere)
    (data / "b").symlink_to(elsewhere / "more")
    (data / "c.jsonl").symlink_to(own)
    assert find_files(data) == {
        "a": [own, data / "a" / "linked" / "3.jsonl", data / "a" / "linked" / "more" / "2.jsonl"],
        "b": [data / "b" / "2.jsonl"],
        "c": [data / "c.jsonl"],
    }
    (data / "README.md").touch()
    linked, left_out = describe_folder(data)
    assert f"{data / 'a' / 'linked'} -> {elsewhere}" in linked and f"{data / 'b'} -> {elsewhere / 'more'}" in linked
    assert left_out == "  files left out because of their endings: 1 .md"
    assert describe_folder(own) == describe_folder(data / "a" / "deep") == [], "control"


def circle(folder: Path) -> None:
    (folder / "again").symlink_to(folder.parent)


def loop(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")


def twice(folder: Path) -> None:
    (folder / "latest").symlink_to("deep")


def nothing(folder: Path) -> None:
    (folder / "gone").symlink_to("/nowhere/at/all")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jsonl")


UNREADABLE = {
    circle: "again: found a link to a folder that holds it",
    loop: "loop: cannot be read: Too many levels of symbolic links",
    twice: r"latest/1\.jsonl: found a link to .*deep/1\.jsonl of the same data set",
    nothing: r"gone: cannot be read: No such file or directory \(a link to nothing\)",
    pipe: r"pipe\.jsonl: found a pipe, socket or device",
}


@pytest.mark.parametrize("make", UNREADABLE)
def test_what_cannot_be_read_is_named(tmp_path, make):
    write(tmp_path / "a" / "deep" / "1.jsonl", GOOD)
    assert list(find_files(tmp_path)) == ["a"], "control"
    make(tmp_path / "a")
    with pytest.raises(UserError, match=UNREADABLE[make]) as error:
        find_files(tmp_path)
    assert "\n" not in str(error.value)


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    pipe(tmp_path)
    with pytest.raises(UserError, match="found a pipe, socket or device, wanted a file"):
        list(read_blocks(tmp_path / "pipe.jsonl"))


@pytest.mark.skipif(os.getuid() != 0, reason="another user's rights are tried by taking them up")
def test_a_folder_that_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write(folder / "a" / "1.jsonl", GOOD)
        write(folder / "b" / "closed" / "1.jsonl", GOOD).parent.chmod(0o700)
        os.seteuid(65534)
        try:
            with pytest.raises(UserError, match="b/closed: cannot be read: Permission denied"):
                find_files(folder)
            assert list(find_files(folder / "a")) == ["1"], "control"
        finally:
            os.seteuid(0)
