"""The files of a data set: all that are there are read, or one line names what is not."""

import gzip
import json
import os
import tempfile
from pathlib import Path

import pytest
from helpers import run, train_flags

from gritlm.data.folders import describe_folder, find_files, is_test_split
from gritlm.data.rows import read_blocks
from gritlm.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:cdcd\nsize 52113\n"
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


def layout(root: Path, *names: str) -> Path:
    for name in names:
        write(root / name, GOOD)
    return root


def sets_of(root: Path) -> dict[str, list[str]]:
    """The files of each set by their names below the folder."""
    return {name: [str(file.relative_to(root)) for file in files] for name, files in find_files(root).items()}


SHARDS = [f"train-0000{number}-of-00003.parquet" for number in range(3)]
HASHED = [f"train-0000{number}-of-00002-a09b74b3ef9c3b5{number}.parquet" for number in range(2)]
LAYOUTS = {  # files -> the sets that are found; all other data files are named
    "shards are one set": ([*SHARDS, "test-00000-of-00001.parquet"], {"train": SHARDS}),
    "shards with a hash": ([*HASHED, "validation-00000-of-00001-b3ef9c3b5a09b740.parquet"], {"train": HASHED}),
    "a clone of a hub data set": (
        [*(f"data/{name}" for name in SHARDS), "data/test-00000-of-00001.parquet", "README.md"],
        {"data": [f"data/{name}" for name in SHARDS]},
    ),
    "a clone with configurations": (
        ["en/train-00000-of-00001.parquet", "en/dev-00000-of-00001.parquet", "de/train.jsonl", "de/test.jsonl.gz"],
        {"de": ["de/train.jsonl"], "en": ["en/train-00000-of-00001.parquet"]},
    ),
    "splits as folders": (
        ["train/0000.parquet", "test/0000.parquet", "VALID/0.jsonl"],
        {"train": ["train/0000.parquet"]},
    ),
    "names of sets with splits": (
        ["nq_train.jsonl", "nq_dev.jsonl", "val2017.jsonl", "msmarco.eval.small.jsonl", "hotpot-test1.JSONL"],
        {"nq_train": ["nq_train.jsonl"]},
    ),
    "what gritlm prepare writes": (["train/a.jsonl", "held_out/corpus.jsonl"], {"train": ["train/a.jsonl"]}),
    "other words to test on": (
        [
            *("fine.jsonl", "Test.jsonl", "TESTING.jsonl", "nq_VALID.jsonl", "holdout.jsonl", "nq-heldout.jsonl"),
            *("held-out/x.jsonl", "hold_out.jsonl", "testset.jsonl", "devset.jsonl", "evals/x.jsonl", "tst.jsonl"),
            *("TestData.jsonl", "nqTest.jsonl", "nqDevSet.jsonl", "TestPairs.jsonl", "validate.jsonl"),
            *("benchmark.jsonl", "split=test/0.parquet", "test(1).jsonl"),
        ],
        {"fine": ["fine.jsonl"]},
    ),
    "letter case": (
        ["A.JSONL", "b.Parquet", "c.jsonl.GZ"],
        {"A": ["A.JSONL"], "b": ["b.Parquet"], "c": ["c.jsonl.GZ"]},
    ),
    "control: words that hold such a word": (
        [
            *("latest.jsonl", "evaluate_me.jsonl", "device.jsonl", "valley/contest.jsonl", "DevOps.jsonl"),
            *("attestation.jsonl", "evaluator_notes.jsonl", "latestNews.jsonl"),
        ],
        {
            **{name: [f"{name}.jsonl"] for name in ("DevOps", "attestation", "evaluator_notes", "latestNews")},
            "device": ["device.jsonl"],
            "evaluate_me": ["evaluate_me.jsonl"],
            "latest": ["latest.jsonl"],
            "valley": ["valley/contest.jsonl"],
        },
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_splits_to_test_on_are_left_out_and_named(tmp_path, name):
    files, sets = LAYOUTS[name]
    layout(tmp_path, *files)
    assert sets_of(tmp_path) == sets
    left_out = {*files} - {file for found in sets.values() for file in found}
    assert {file for file in files if any(file in line for line in describe_folder(tmp_path))} == left_out
    for file in left_out - {"README.md"}:  # given by itself, it is meant
        assert list(find_files(tmp_path / file).values()) == [[tmp_path / file]]
    assert is_test_split(tmp_path / files[0]), "control: words above the folder do not count"


def test_a_plan_says_what_is_trained_on(tmp_path, qwen3):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        rows = ({"query": f"{name} {n}", "pos": [f"of {name} {n}"], "neg": []} for n in range(2))
        write(tmp_path / "set" / "data" / f"{name}.jsonl", *rows)
    (tmp_path / "set" / "README.md").touch()
    flags = train_flags(qwen3, tmp_path / "set", tmp_path / "out", tmp_path / "cache", global_batch_size=2)
    done = run("-m", "gritlm", "plan", *flags)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("  data: 4 rows, 2 batches") for line in lines)
    assert any(line.endswith("to train on it): data/test-00000-of-00001.jsonl") for line in lines)
    assert "  files left out because of their endings: README.md" in lines
    (tmp_path / "set" / "data" / "train-00001-of-00002.jsonl").write_bytes(LFS)
    done = run("-m", "gritlm", "plan", *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "train-00001-of-00002.jsonl: found a Git LFS pointer" in done.stderr


def test_a_folder_of_test_splits_alone_is_refused(tmp_path):
    layout(tmp_path, "data/test-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet")
    with pytest.raises(
        UserError, match=r"found test splits alone: data/test-0.*, data/validation-0.*; name a file itself"
    ):
        find_files(tmp_path)
    layout(tmp_path, "data/train-00000-of-00001.parquet")
    assert sets_of(tmp_path) == {"data": ["data/train-00000-of-00001.parquet"]}, "control"


TWICE = {
    "another form": (
        ["a/1.jsonl", "a/1.parquet"],
        r"a/1\.parquet: found 1\.jsonl beside it, wanted the rows of 1 once",
    ),
    "two numberings": (
        ["a/t-00000-of-00001.jsonl", "a/t-00000-of-00002.jsonl"],
        "wanted shards of one number of files",
    ),
    "two numberings at the top": (["t-00000-of-00001.jsonl", "t-00000-of-00002.jsonl"], "found a second data set 't'"),
    "shards in two forms": (["t-00000-of-00001.jsonl", "t-00000-of-00001.parquet"], "found a second data set 't'"),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_set_that_would_be_read_twice_is_refused(tmp_path, name):
    files, message = TWICE[name]
    layout(tmp_path, *files[:1])
    find_files(tmp_path)  # control
    layout(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        find_files(tmp_path)


def test_missing_shards_and_each_file_that_is_not_read_are_named(tmp_path):
    layout(tmp_path, "a/train-00000-of-00003.jsonl", "a/train-00002-of-00003.jsonl", "b-00000-of-00001.jsonl")
    assert describe_folder(tmp_path) == ["  a/train: found 2 of 3 shards"]
    assert describe_folder(tmp_path / "a/train-00002-of-00003.jsonl") == ["  train: found 1 of 3 shards"]
    assert describe_folder(tmp_path / "b-00000-of-00001.jsonl") == [], "control"
    others = [f"a/{number:02}.csv" for number in range(23)]
    layout(tmp_path, *others)
    left_out, _ = describe_folder(tmp_path)
    assert left_out == f"  files left out because of their endings: {', '.join(others[:20])}, and 3 more"
    layout(tmp_path, "a/train-00001-of-00003.jsonl")
    assert describe_folder(tmp_path) == [left_out], "control"
    with pytest.raises(UserError, match=r"a folder without data \(it holds 01\.csv; see gritlm prepare\), wanted"):
        find_files(layout(tmp_path / "c", "01.csv"))


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
    assert left_out == "  files left out because of their endings: README.md"
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
