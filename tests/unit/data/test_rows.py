"""Rows: nothing of a good row is lost, and the error of a bad one names file, line and field."""

import json

import pytest

from gritlm.data.containers import FileError
from gritlm.data.folders import find_files
from gritlm.data.rows import parse_block, read_blocks, text_id
from gritlm.errors import UserError

GOOD = {"query": ["Instruct: x\nQuery: ", "what"], "pos": ["this"], "neg": []}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path) -> int:
    """Parse a file; returns the number of rows."""
    return sum(len(parse_block(path, block)) for block in read_blocks(path))


def test_equal_texts_have_equal_ids_on_every_machine():
    assert text_id("a text \n") == text_id("a text") == 5830437876521264211
    assert len({text_id(text) for text in ("a text", " a text", "a  text", "A text")}) == 4


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
def test_the_error_names_the_line_and_the_field_of_a_bad_row(tmp_path, name):
    line, message = BAD[name]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)


def test_a_path_without_rows_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="found no row"):
        read(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="No such file"):
        find_files(tmp_path / "absent.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder without data"):
        find_files(tmp_path / "folder")


NOT_LINES = {  # of rows in a file for training
    "CSV": ("Query,Positive,Negative\n7,Water.,A loaf.\ntrue,Snow.,\n", r"text that is not JSON \(line 1: 'Query,Pos"),
    "TSV": ("q\tp\nnot\tJSON\n", "text that is not JSON"),
    "YAML": ("- query: q\n  pos: [p]\n", "text that is not JSON"),
    "a JSON array": ("[\n  {}\n]\n", "one JSON array"),
    "a JSON array on one line": (f"[{json.dumps(GOOD)}, {json.dumps(GOOD)}]\n", "one JSON array"),
    "JSON that is indented": (json.dumps(GOOD, indent=1), "one JSON object over several lines"),
}


@pytest.mark.parametrize("name", NOT_LINES)
def test_a_file_of_another_form_is_one_fault_of_the_file(tmp_path, name):
    content, found = NOT_LINES[name]
    for path in (tmp_path / "a.jsonl", tmp_path / "a.csv"):
        path.write_text(content)
        with pytest.raises(
            FileError, match=rf"a\.\w+: found {found}.*; gritlm prepare makes rows for training of \.csv"
        ) as error:
            read(path)
        assert ":1: " not in str(error.value) and "\n" not in str(error.value)


def test_control_a_first_line_that_is_no_row_is_a_bad_row(tmp_path):
    for line in ("# rows", "Query,Positive", "null", '["x"]', "\ufeff" + json.dumps(GOOD)):
        write(tmp_path / "a.jsonl", GOOD)
        rest = (tmp_path / "a.jsonl").read_text()
        (tmp_path / "a.jsonl").write_text(f"{line}\n{rest}")
        with pytest.raises(UserError, match=r"a\.jsonl:1: found") as error:
            read(tmp_path / "a.jsonl")
        assert not isinstance(error.value, FileError)


def test_malformed_files_are_read_in_full_or_refused_at_the_bad_line(shared_data, tmp_path):
    folder = shared_data / "malformed"
    (tmp_path / "symlink_loop.jsonl").symlink_to("symlink_loop.jsonl")
    counted = {"neg_contains_positive.jsonl"}  # the negative is dropped and counted
    wrong = []
    for line in (folder / "EXPECTED.tsv").read_text().splitlines():
        name, number, verdict = line.split("\t")
        path = folder / name if (folder / name).exists() else tmp_path / name
        if name == "no_read_permission.jsonl":
            continue  # root can read it
        try:
            find_files(path)
            rows = sum(bool(row.strip()) for row in path.read_bytes().split(b"\n"))
            found = "OK" if read(path) == rows else "rows lost"
        except UserError as error:
            place = f"{path}:{number}: " if number != "0" else f"{path}: "
            found = "refused" if str(error).startswith(place) else str(error)
        wanted = "OK" if verdict == "OK" or name in counted else "refused"
        if found != wanted:
            wrong.append((name, number, verdict, found))
    assert not wrong
