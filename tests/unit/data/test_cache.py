"""The cached form of a file: that of the bytes the file has now, and for the eyes of those who may read the file."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gritlm.data import cache
from gritlm.data.records import load_records
from gritlm.errors import UserError


def write(path: Path, positive: str) -> Path:
    path.write_text(json.dumps({"query": "q", "pos": [positive], "neg": []}) + "\n", encoding="utf-8")
    os.utime(path, (1, 1))  # as in an image, an archive or a git tree
    return path


def first(path: Path, folder: Path) -> str:
    (records,) = load_records(path, folder)
    return records[0].positives[0].text


@pytest.fixture(params=["read each time", "noted"])
def later(request, monkeypatch) -> bool:
    """Whether all happens so long after the last change that the hash of the file is noted."""
    if request.param == "noted":
        monkeypatch.setattr(cache.time, "time_ns", lambda now=time.time_ns: now() + 10**10)
    return request.param == "noted"


def test_other_rows_of_the_same_size_and_time_are_read(tmp_path, later):
    folder = tmp_path / "cache"
    path = write(tmp_path / "a.jsonl", "one")
    assert [first(path, folder), first(path, folder)] == ["one", "one"]
    assert len(list(folder.glob(".*.sha256"))) == later
    before = path.stat()
    write(path, "two")
    assert (before.st_size, before.st_mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns), "control"
    assert first(path, folder) == "two"
    write(tmp_path / "new.jsonl", "six").replace(path)
    assert first(path, folder) == "six"


def test_control_a_noted_hash_is_not_computed_again(tmp_path, monkeypatch):
    path, folder = write(tmp_path / "a.jsonl", "one"), tmp_path / "cache"
    monkeypatch.setattr(cache.time, "time_ns", lambda now=time.time_ns: now() + 10**10)
    first(path, folder)
    monkeypatch.setattr(cache, "content_hash", lambda path: pytest.fail("read again"))
    assert first(path, folder) == "one"


def test_the_same_rows_in_another_place_have_one_cached_form(tmp_path):
    (tmp_path / "copy").mkdir()
    for path in (tmp_path / "a.jsonl", tmp_path / "copy" / "a.jsonl"):
        first(write(path, "one"), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", "one")

    def append(file: Path) -> list[str]:
        with open(file, "a", encoding="utf-8") as out:
            out.write("\n")
        return []

    monkeypatch.setattr(cache, "unread_columns", append)
    with pytest.raises(UserError, match="found a file that changed while it was read"):
        first(path, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that all users may read, as pytest's own may not be."""
    before = os.umask(0o022)
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
    os.umask(before)


@pytest.mark.parametrize(
    ("mode", "folder_mode", "wanted"), [(0o644, 0o755, 0o644), (0o640, 0o755, 0o600), (0o644, 0o750, 0o600)]
)
def test_who_may_not_read_a_file_may_not_read_its_cached_form(public, mode, folder_mode, wanted):
    (public / "data").mkdir(mode=folder_mode)
    path = write(public / "data" / "a.jsonl", "one")
    path.chmod(mode)
    first(path, public / "cache")
    assert (public / "cache").stat().st_mode & 0o777 == 0o700
    (cached,) = (public / "cache").glob("*.arrow")
    assert cached.stat().st_mode & 0o777 == wanted
    (public / "cache").chmod(0o755)
    first(path, public / "cache")
    assert (public / "cache").stat().st_mode & 0o777 == 0o755, "what another made stays as it is"


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's rights are tried by taking them up")
def test_a_shared_cache_that_another_user_made_gets_an_own_folder(public, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(public / "shared"))
    assert cache.open_cache() == public / "shared" / "gritlm"
    (public / "shared").chmod(0o1777)
    os.seteuid(65534)
    try:
        assert cache.open_cache() == public / "shared" / "gritlm-65534"
        with pytest.raises(UserError, match="cannot be written: Permission denied; see --data_cache"):
            cache.open_cache(public / "shared" / "gritlm" / "inside")
    finally:
        os.seteuid(0)


def test_a_name_that_libraries_would_take_for_another_is_refused(tmp_path, monkeypatch):
    latin = write(tmp_path / os.fsdecode(b"caf\xe9.jsonl"), "one")
    with pytest.raises(OSError, match=r"b'.*caf\\xe9\.jsonl', wanted a name in UTF-8"):
        first(latin, tmp_path / "cache")
    chinese = write(tmp_path / "\u6570\u636e.jsonl", "one")
    assert first(chinese, tmp_path / "cache") == "one", "control"
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "gbk")
    with pytest.raises(OSError, match=r"since the locale's encoding is gbk, or a UTF-8 locale \(LC_ALL=C\.UTF-8\)"):
        first(chinese, tmp_path / "cache")
