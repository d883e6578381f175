"""Reading: what is accepted loses nothing, what is refused names file, line and field."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gritlm.data.records import find_files, load_records
from gritlm.data.rows import text_id
from gritlm.errors import UserError
from gritlm.files import written_aside
from gritlm.models.text import Text

GOOD = {"query": ["Instruct: x\nQuery: ", "what"], "pos": ["this"], "neg": []}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_form_of_a_text_is_kept(tmp_path):
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


def test_jsonl_gz_and_parquet_read_alike(tmp_path):
    rows = [{"query": ["i ", f"q{n}"], "pos": [f"p{n}"], "neg": ["n"] * (n % 3)} for n in range(50)]
    write(tmp_path / "a.jsonl", *rows)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as out:
        out.write((tmp_path / "a.jsonl").read_text())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    sets = load_records(tmp_path, tmp_path / "cache")
    assert [s.name for s in sets] == ["a", "b", "c"]
    for n in range(50):
        assert sets[0][n] == sets[1][n] == sets[2][n]


def test_a_sub_folder_is_one_set_and_order_is_sorted(tmp_path):
    for name in ("z/part-2.jsonl", "z/part-1.jsonl", "b.jsonl"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, {"query": name, "pos": ["p"], "neg": []})
    (tmp_path / "data" / "README.md").write_text("not data")
    b, z = load_records(tmp_path / "data", tmp_path / "cache")
    assert (b.name, z.name) == ("b", "z")
    assert [z[i].query.text for i in range(2)] == ["z/part-1.jsonl", "z/part-2.jsonl"]


def test_a_positive_among_the_negatives_is_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", {"query": "q", "pos": ["same", "other"], "neg": ["bad", "same ", "other"]})
    (records,) = load_records(path, tmp_path / "cache")
    assert records[0].negatives == [Text("", "bad")]
    assert records.dropped_negatives == 2


def test_positives_of_the_same_query_in_other_rows_are_known(tmp_path):
    rows = [
        {"query": "twice", "pos": ["one"], "neg": ["two", "bad"]},
        {"query": "twice", "pos": ["two"], "neg": []},
        {"query": ["other task: ", "twice"], "pos": ["three"], "neg": []},
    ]
    (records,) = load_records(write(tmp_path / "a.jsonl", *rows), tmp_path / "cache")
    assert set(records[0].known_positives) == set(records[1].known_positives) == {text_id("one"), text_id("two")}
    assert records[0].negatives == [Text("", "bad")]
    assert (records.hidden_negatives, records.dropped_negatives) == (1, 0)
    assert records[2].known_positives == [text_id("three")]


def test_the_fingerprint_is_of_all_texts(tmp_path):
    rows = [GOOD, GOOD | {"neg": ["n"]}, GOOD | {"neg": [["I: ", "n"]]}, GOOD | {"pos": [["I: ", "this"]]}]
    files = [write(tmp_path / f"{number}.jsonl", row) for number, row in enumerate([*rows, GOOD])]
    prints = [load_records(file, tmp_path / "cache")[0].fingerprint() for file in files]
    assert len(set(prints)) == len(rows)
    assert prints[0] == prints[-1]


def test_names_in_a_folder(tmp_path):
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


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    assert len(load_records(path, tmp_path / "cache")[0]) == 1
    write(path, GOOD, GOOD)
    os.utime(path, (1, 1))
    assert len(load_records(path, tmp_path / "cache")[0]) == 2


BAD = {
    "not an object": ('["x"]', "found a list, wanted an object"),
    "no neg": ('{"query": "q", "pos": ["p"]}', "neg: found no such key"),
    "no pos": ('{"query": "q", "neg": []}', "pos: found no such key"),
    "null query": ('{"query": null, "pos": ["p"], "neg": []}', "query: found null"),
    "query of 3": ('{"query": ["a", "b", "c"], "pos": ["p"], "neg": []}', "query: found a list of 3"),
    "query in query": ('{"query": [["a", "b"], "c"], "pos": ["p"], "neg": []}', "query instruction: found a list"),
    "blank query": ('{"query": ["i", " \\n"], "pos": ["p"], "neg": []}', "query: found an empty text"),
    "bare pos": ('{"query": "q", "pos": "p", "neg": []}', "pos: found a string, wanted a list"),
    "no pos in list": ('{"query": "q", "pos": [], "neg": []}', "pos: found an empty list"),
    "number in neg": ('{"query": "q", "pos": ["p"], "neg": ["n", 3]}', "neg[1]: found a number"),
    "half a pair": ('{"query": "\\ud83d", "pos": ["p"], "neg": []}', "query text: found half a surrogate pair"),
    "same key twice": ('{"query": "q", "pos": ["p"], "pos": ["r"], "neg": []}', "key 'pos' given twice"),
    "NaN": ('{"query": "q", "pos": ["p"], "neg": NaN}', "NaN, which is not JSON"),
    "cut off": ('{"query": "q", "pos": ["p', "wanted one JSON object a line"),
    "deep": ("[" * 100_000, "wanted one JSON object a line"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named(tmp_path, name):
    line, message = BAD[name]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(UserError) as error:
        load_records(path, tmp_path / "cache")
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)


def test_a_bad_file_leaves_no_cache_behind(tmp_path):
    with pytest.raises(UserError):
        load_records(write(tmp_path / "a.jsonl", GOOD, {}), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_writer_left_goes_a_day_later(tmp_path):
    old, fresh, of_another = (tmp_path / f".{name}.part" for name in ("out.1", "out.2", "other.1"))
    for left in (old, fresh, of_another):
        left.mkdir()
        (left / "half").touch()
    for left in (old, of_another):
        os.utime(left, (0, 0))
    with written_aside(tmp_path / "out") as aside:
        aside.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", fresh.name, of_another.name}


DAMAGE = {
    "empty": lambda whole: b"",
    "cut off": lambda whole: whole[:300],
    "cut off behind a batch": lambda whole: whole[:-8],
    "zeros": lambda whole: bytes(len(whole)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    path = write(tmp_path / "a.jsonl", GOOD)
    load_records(path, tmp_path / "cache")
    (cached,) = (tmp_path / "cache").iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(damage(whole))
    (records,) = load_records(path, tmp_path / "cache")
    assert records[0].query == Text(*GOOD["query"])
    assert cached.read_bytes() == whole


def test_nothing_to_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="found no row"):
        load_records(tmp_path / "empty.jsonl", tmp_path / "cache")
    with pytest.raises(UserError, match="No such file"):
        find_files(tmp_path / "absent.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder without data"):
        find_files(tmp_path / "folder")


def test_every_malformed_file_gets_its_verdict(shared_data, tmp_path):
    """49 kinds of file: accepted without loss, or refused at the line that is wrong."""
    folder = shared_data / "malformed"
    (tmp_path / "symlink_loop.jsonl").symlink_to("symlink_loop.jsonl")
    counted = {"neg_contains_positive.jsonl"}  # documented: that negative is left out and counted
    wrong = []
    for line in (folder / "EXPECTED.tsv").read_text().splitlines():
        name, number, verdict = line.split("\t")
        path = folder / name if (folder / name).exists() else tmp_path / name
        if name == "no_read_permission.jsonl":
            continue  # root reads it all the same
        try:
            (records,) = load_records(path, tmp_path / "cache")
            text = path.read_bytes().split(b"\n")
            found = "OK" if len(records) == sum(bool(row.strip()) for row in text) else "rows lost"
        except UserError as error:
            place = f"{path}:{number}: " if number != "0" else f"{path}: "
            found = "refused" if str(error).startswith(place) else str(error)
        wanted = "OK" if verdict == "OK" or name in counted else "refused"
        if found != wanted:
            wrong.append((name, number, verdict, found))
    assert not wrong


def test_many_processes_read_the_same(tmp_path, monkeypatch):
    """In order, and the first bad row is the one that is named."""
    rows = [{"query": f"q{n}", "pos": [f"p{n} " + "x" * 2000], "neg": []} for n in range(2000)]
    path = write(tmp_path / "a.jsonl", *rows)
    (one,) = load_records(path, tmp_path / "one")
    monkeypatch.setattr("gritlm.data.records.LARGE", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    (three,) = load_records(path, tmp_path / "three")
    assert one.fingerprint() == three.fingerprint()
    assert [three[n] for n in (0, 999, 1999)] == [one[n] for n in (0, 999, 1999)]
    write(path, *rows[:600], {}, *rows, {})
    with pytest.raises(UserError, match=r"a\.jsonl:601: query: found no such key"):
        load_records(path, tmp_path / "three")
