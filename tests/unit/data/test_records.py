"""Data sets: rows come back as they were written, whatever happens to the cache."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gritlm.data.records import load_records
from gritlm.data.rows import text_id
from gritlm.errors import UserError
from gritlm.models.text import Text

GOOD = {"query": ["Instruct: x\nQuery: ", "what"], "pos": ["this"], "neg": []}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_and_instructions_come_back_as_written(tmp_path):
    rows = [
        GOOD,
        {"query": "plain", "pos": [["Passage: ", "with"], "without"], "neg": ["n1", ["I: ", "n2"]], "extra": 1},
        {"query": "line\u2028separator\u0085inside", "pos": ["ünïcödé 中文"], "neg": []},
    ]
    (records,) = load_records(write(tmp_path / "a.jsonl", *rows), tmp_path / "cache")
    assert [records[i].query for i in range(3)] == [
        Text("Instruct: x\nQuery: ", "what"),
        Text("", "plain"),
        Text("", "line\u2028separator\u0085inside"),
    ]
    assert records[1].positives == [Text("Passage: ", "with"), Text("", "without")]
    assert records[1].negatives == [Text("", "n1"), Text("I: ", "n2")]
    assert records.longest_group == 3
    assert records.instructions == ["", "Instruct: x\nQuery: "]
    assert records.passage_instructions == ["", "I: ", "Passage: "]


def test_all_file_formats_give_the_same_records(tmp_path):
    rows = [{"query": ["i ", f"q{n}"], "pos": [f"p{n}"], "neg": ["n"] * (n % 3)} for n in range(50)]
    write(tmp_path / "a.jsonl", *rows)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as out:
        out.write((tmp_path / "a.jsonl").read_text())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    sets = load_records(tmp_path, tmp_path / "cache")
    assert [s.name for s in sets] == ["a", "b", "c"]
    for n in range(50):
        assert sets[0][n] == sets[1][n] == sets[2][n]


def test_instructions_are_counted(tmp_path):
    rows = [GOOD, GOOD, {"query": "plain", "pos": [["P: ", "a"], "b"], "neg": [["P: ", "c"]]}]
    (records,) = load_records(write(tmp_path / "a.jsonl", *rows), tmp_path / "cache")
    assert records.instruction_counts == {"Instruct: x\nQuery: ": 2, "": 1}
    assert records.passage_instruction_counts == {"": 3, "P: ": 2}


def test_keys_that_are_not_read_are_counted(tmp_path):
    rows = [GOOD | {"prompt": "Q: ", "\ud800": 1}, GOOD | {"prompt": None}, GOOD]
    (records,) = load_records(write(tmp_path / "a.jsonl", *rows), tmp_path / "cache")
    assert records.unread == {"prompt": 2, "\ud800": 1}
    table = pa.Table.from_pylist([{"query": "q", "pos": ["p"], "neg": ["n"], "type": 1, "at": 2}] * 3)
    pq.write_table(table, tmp_path / "b.parquet")
    (records,) = load_records(tmp_path / "b.parquet", tmp_path / "cache")
    assert records.unread == {"at": 3, "type": 3}
    pq.write_table(table.select(["query", "pos", "neg"]), tmp_path / "c.parquet")
    assert not load_records(tmp_path / "c.parquet", tmp_path / "cache")[0].unread


def test_rows_whose_instructions_tell_positives_from_negatives(tmp_path):
    rows = [
        {"query": "q", "pos": [[p, f"x{n}"] for n, p in enumerate(ps)], "neg": [[n, f"y {n}"] for n in ns]}
        for ps, ns in (
            *[(["P: "], [""]), (["P: "], ["N: ", ""]), ([""], ["P: "])],  # these do
            *[(["P: "], ["P: ", ""]), ([""], [""]), (["P: "], []), (["P: ", ""], [""])],
        )
    ]
    (records,) = load_records(write(tmp_path / "a.jsonl", *rows), tmp_path / "cache")
    assert records.revealing_rows == 3
    (records,) = load_records(write(tmp_path / "b.jsonl", *rows[3:]), tmp_path / "cache")
    assert records.revealing_rows == 0


def test_a_sub_folder_is_one_data_set_and_files_are_sorted(tmp_path):
    for name in ("z/part-2.jsonl", "z/part-1.jsonl", "b.jsonl"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, {"query": name, "pos": ["p"], "neg": []})
    (tmp_path / "data" / "README.md").write_text("not data")
    b, z = load_records(tmp_path / "data", tmp_path / "cache")
    assert (b.name, z.name) == ("b", "z")
    assert [z[i].query.text for i in range(2)] == ["z/part-1.jsonl", "z/part-2.jsonl"]


def test_a_negative_that_repeats_a_positive_is_dropped_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", {"query": "q", "pos": ["same", "other"], "neg": ["bad", "same ", "other"]})
    (records,) = load_records(path, tmp_path / "cache")
    assert records[0].negatives == [Text("", "bad")]
    assert records[0].negative_ids == [text_id("bad")]
    assert records.dropped_negatives == 2


def test_a_query_knows_its_positives_in_other_rows(tmp_path):
    rows = [
        {"query": "twice", "pos": ["one"], "neg": ["two", "bad"]},
        {"query": "twice", "pos": ["two"], "neg": []},
        {"query": ["other task: ", "twice"], "pos": ["three"], "neg": []},
    ]
    (records,) = load_records(write(tmp_path / "a.jsonl", *rows), tmp_path / "cache")
    assert records[0].known_positives == records[1].known_positives == sorted([text_id("one"), text_id("two")])
    assert records[0].query_id == records[1].query_id != records[2].query_id
    assert [records[i].positive_ids for i in range(3)] == [[text_id("one")], [text_id("two")], [text_id("three")]]
    assert records[0].negatives == [Text("", "bad")] and records[0].negative_ids == [text_id("bad")]
    assert records.positive_ids(1).tolist() == [text_id("two")]
    assert records.most_positives == 2
    assert (records.hidden_negatives, records.dropped_negatives) == (1, 0)
    assert records[2].known_positives == [text_id("three")]


def test_the_fingerprint_depends_on_every_text_and_instruction(tmp_path):
    rows = [GOOD, GOOD | {"neg": ["n"]}, GOOD | {"neg": [["I: ", "n"]]}, GOOD | {"pos": [["I: ", "this"]]}]
    files = [write(tmp_path / f"{number}.jsonl", row) for number, row in enumerate([*rows, GOOD])]
    prints = [load_records(file, tmp_path / "cache")[0].fingerprint() for file in files]
    assert len(set(prints)) == len(rows)
    assert prints[0] == prints[-1]


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    assert len(load_records(path, tmp_path / "cache")[0]) == 1
    write(path, GOOD, GOOD)
    os.utime(path, (1, 1))
    assert len(load_records(path, tmp_path / "cache")[0]) == 2


def test_a_bad_file_leaves_nothing_in_the_cache(tmp_path):
    with pytest.raises(UserError):
        load_records(write(tmp_path / "a.jsonl", GOOD, {}), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


DAMAGE = {
    "empty": lambda whole: b"",
    "cut off": lambda whole: whole[:300],
    "cut off after a batch": lambda whole: whole[:-8],
    "zeros": lambda whole: bytes(len(whole)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_written_again(tmp_path, damage):
    path = write(tmp_path / "a.jsonl", GOOD)
    load_records(path, tmp_path / "cache")
    (cached,) = (tmp_path / "cache").iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(damage(whole))
    (records,) = load_records(path, tmp_path / "cache")
    assert records[0].query == Text(*GOOD["query"])
    assert cached.read_bytes() == whole


def test_several_processes_give_the_same_records_and_the_same_error(tmp_path, monkeypatch):
    rows = [{"query": f"q{n}", "pos": [f"p{n} " + "x" * 2000], "neg": []} for n in range(2000)]
    path = write(tmp_path / "a.jsonl", *rows)
    (one,) = load_records(path, tmp_path / "one")
    monkeypatch.setattr("gritlm.data.cache.LARGE_FILE", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    (three,) = load_records(path, tmp_path / "three")
    assert one.fingerprint() == three.fingerprint()
    assert [three[n] for n in (0, 999, 1999)] == [one[n] for n in (0, 999, 1999)]
    write(path, *rows[:600], {}, *rows, {})
    with pytest.raises(UserError, match=r"a\.jsonl:601: query: found no such key"):
        load_records(path, tmp_path / "three")
