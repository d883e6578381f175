"""Clones of hub data sets and folders of `save_to_disk`, through the door that prepare uses; no hub."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gritlm.data.containers import FileError
from gritlm.data.raw import BadRows, Columns
from gritlm.data.sources import COLUMN_FLAGS, load_error, open_source
from gritlm.errors import UserError


def pairs(*names):
    return [{"query": f"query {name}", "positive": f"passage {name}"} for name in names]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))


def read(name, split=None, config=None, bad=None):
    source = open_source(str(name), Columns(), bad or BadRows(), split, config)
    return [str(example.query).removeprefix("query ") for example in source.examples], source


def clone(folder):
    write(folder / "data/train-00000-of-00002.parquet", pairs("a", "b"))
    write(folder / "data/train-00001-of-00002.parquet", pairs("c"))
    write(folder / "data/test-00000-of-00001.parquet", pairs("t"))
    (folder / "README.md").write_text("# a set\n")
    return folder


@pytest.mark.parametrize("prefix", ["", "hub:"])
def test_a_clone_gives_one_split(tmp_path, prefix):
    found, source = read(f"{prefix}{clone(tmp_path / 'set')}")
    assert found == ["a", "b", "c"] and source.used == COLUMN_FLAGS | {"split", "config"}
    assert "1 files of the folder not read: data/test-00000-of-00001.parquet" in source.reading.lines()
    assert read(f"{prefix}{tmp_path / 'set'}", "test")[0] == ["t"], "control"
    with pytest.raises(FileError, match=r"set: found the splits train, test; wanted the split dev \(--split\)"):
        read(tmp_path / "set", "dev")


def test_files_to_test_on_are_left_out_of_a_folder_without_splits(tmp_path):
    for name in ("a", "latest", "Test", "nq_VALID", "holdout", "held_out/x"):
        write(tmp_path / "set" / f"{name}.jsonl", pairs(name))
    found, source = read(tmp_path / "set")
    assert found == ["a", "latest"], "control: latest is no word for it"
    named = "Test.jsonl, held_out/x.jsonl, holdout.jsonl, nq_VALID.jsonl"
    assert f"4 files of the folder not read: {named}" in source.reading.lines()
    write(tmp_path / "alone" / "holdout.jsonl", pairs("t"))
    with pytest.raises(FileError, match=r"alone: found test splits alone; name a file itself to read it"):
        read(tmp_path / "alone")


def test_a_clone_without_a_train_split_is_not_trained_on(tmp_path):
    write(tmp_path / "set/data/test-00000-of-00001.parquet", pairs("t"))
    with pytest.raises(
        FileError, match=r"set: found the splits test; wanted train, or the name of another split \(--spl"
    ):
        read(tmp_path / "set")


def test_configurations(tmp_path):
    write(tmp_path / "set/en/train.jsonl", pairs("e"))
    write(tmp_path / "set/de/1.jsonl", pairs("d"))
    configs = "- config_name: en\n  data_files: en/train.jsonl\n- config_name: de\n  data_files: de/*.jsonl\n"
    (tmp_path / "set/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(FileError, match=r"set: cannot be read: .*\['en', 'de'\].* \(--config\)"):
        read(tmp_path / "set")
    with pytest.raises(FileError, match=r"set: cannot be read: .*'fr'.*\['en', 'de'\] \(--config\)"):
        read(tmp_path / "set", config="fr")
    assert read(tmp_path / "set", config="de")[0] == ["d"] and read(tmp_path / "set", config="en")[0] == ["e"]


def test_save_to_disk(tmp_path):
    import datasets

    parts = {"train": datasets.Dataset.from_list(pairs("a", "b")), "test": datasets.Dataset.from_list(pairs("t"))}
    parts["train"].select([1]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "all")
    assert read(tmp_path / "one")[0] == ["b"]
    assert read(tmp_path / "all")[0] == ["a", "b"] and read(tmp_path / "all", "test")[0] == ["t"]
    with pytest.raises(FileError, match="found the splits train, test; wanted the split dev"):
        read(tmp_path / "all", "dev")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(FileError, match="one: cannot be read: "):
        read(tmp_path / "one")


def test_a_retrieval_set_of_the_hub_is_a_beir_folder(tmp_path):
    write(tmp_path / "set/corpus/corpus-00000-of-00001.parquet", [{"_id": "d", "title": "", "text": "passage a"}])
    write(tmp_path / "set/queries/queries-00000-of-00001.parquet", [{"_id": "q", "text": "query a"}])
    write(tmp_path / "set/data/train-00000-of-00001.parquet", [{"query-id": "q", "corpus-id": "d", "score": 1}])
    found, source = read(tmp_path / "set")
    assert found == ["a"] and source.used == {"split"}


def test_a_pointer_an_archive_or_nothing_in_a_clone(tmp_path):
    folder = clone(tmp_path / "set") / "data"
    (folder / "train-00000-of-00002.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")
    with pytest.raises(FileError, match=r"train-00000-of-00002\.parquet: found a Git LFS pointer"):
        read(tmp_path / "set")
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "set.zip").write_bytes(b"PK\x03\x04 ")
    with pytest.raises(UserError, match="zip"):
        read(tmp_path / "zipped")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"empty: cannot be read: .*doesn't contain any data files"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match=r"nothing: no such file or folder \(a data set of the hub is hub:NAME\)"):
        read(tmp_path / "nothing")


def test_skipped_rows_are_listed_once(tmp_path):
    (tmp_path / "a.csv").write_text('query,positive\nq1,p1\nq2,"p2" x\nq3,p3\n')
    bad = BadRows(skip=True)
    found, source = read(tmp_path / "a.csv", bad=bad)
    assert found == ["q1", "q3"] and source.used == COLUMN_FLAGS | {"split", "no_header"}
    assert len(bad.messages) == 1


def test_the_hub_says_what_failed(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileError, match=r"hub:nobody/nothing: cannot be read: .*nobody/nothing") as raised:
        read("hub:nobody/nothing")
    assert "\n" not in str(raised.value)
    several = ValueError("Config name is missing. Pick one among: ['corpus', 'queries', 'default']")
    assert "it is a retrieval set: hf download --repo-type dataset a/b" in str(load_error("hub:a/b", several))
    assert "retrieval" not in str(load_error("hub:a/b", ValueError("Pick one config of ['en', 'de']"))), "control"
