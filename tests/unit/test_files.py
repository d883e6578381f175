"""Files are complete or absent, and in UTF-8; the remains of killed writers are removed."""

import ast
import errno
import os
import stat

import pytest
from helpers import ROOT

from gritlm.files import to_disk, written_aside

FILES = sorted(path for room in ("gritlm", "models", "scripts") for path in (ROOT / room).rglob("*.py"))


def test_the_remains_of_a_killed_writer_are_removed_a_day_later(tmp_path):
    old, fresh, of_another = (tmp_path / f".{name}.part" for name in ("out.1", "out.2", "other.1"))
    for remains in (old, fresh, of_another):
        remains.mkdir()
        (remains / "half").touch()
    for remains in (old, of_another):
        os.utime(remains, (0, 0))
    with written_aside(tmp_path / "out") as aside:
        aside.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", fresh.name, of_another.name}


def refuse_fsync(monkeypatch, code: int, of_folders: bool) -> None:
    """What a file system does that cannot fsync: no such file system can be mounted here."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) == of_folders:
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM])
def test_a_file_system_that_cannot_fsync_a_folder_is_good_enough(tmp_path, monkeypatch, code):
    refuse_fsync(monkeypatch, code, of_folders=True)
    with written_aside(tmp_path / "out") as aside:
        (aside / "inside").mkdir(parents=True)
    assert (tmp_path / "out" / "inside").is_dir()


@pytest.mark.parametrize("of_folders", [True, False])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_what_is_not_on_the_disk_is_an_error(tmp_path, monkeypatch, code, of_folders):
    refuse_fsync(monkeypatch, code, of_folders)
    with pytest.raises(OSError, match=os.strerror(code)), written_aside(tmp_path / "out") as aside:
        aside.write_text("whole")


def test_a_file_that_may_not_be_opened_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    refuse_fsync(monkeypatch, errno.EACCES, of_folders=False)
    with pytest.raises(PermissionError):
        to_disk(tmp_path / "file")


def in_the_locales_encoding(source: str) -> list[str]:
    """The calls that open a file as text, and leave its encoding to the locale."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        mode = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else "r"
        method = isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text")
        opened = isinstance(node.func, ast.Name) and node.func.id == "open" and "b" not in mode
        if method or opened:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_in_the_locales_encoding(path):
    assert in_the_locales_encoding(path.read_text(encoding="utf-8")) == []


def test_control_a_file_in_the_locales_encoding_is_noticed():
    source = "open(a)\nopen(a, 'w')\nopen(a, 'rb')\np.read_text()\np.write_text(t, encoding='utf-8')"
    assert in_the_locales_encoding(source) == ["open(a)", "open(a, 'w')", "p.read_text()"]
