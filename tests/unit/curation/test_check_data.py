"""check-data finds what is wrong, agrees with the loader, and no content of a file makes it crash."""

import errno
import gzip
import json
import shutil
from math import nan

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gritlm.cli import run_verb
from gritlm.curation import fix
from gritlm.curation.check_data import check, describe_file, main
from gritlm.data.rows import parse_block, read_blocks
from gritlm.errors import UserError

MAX_LENGTHS = {"query": 512, "passage": 512}
GOOD = {"query": ["Instruct: x\nQuery: ", "what is it"], "pos": ["this"], "neg": ["that"]}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def report_of(tmp_path, *paths, more=()) -> tuple[int, list[list[str]]]:
    """The exit code, and the findings: file name, line, what."""
    out = tmp_path / "report.tsv"
    out.unlink(missing_ok=True)
    code = main([*map(str, paths), "--report", str(out), "--processes", "1", *map(str, more)])
    rows = [line.split("\t", 2) for line in out.read_text().splitlines()]
    return code, [[file.rsplit("/", 1)[1], line, what] for file, line, what in rows]


def test_good_files_have_no_findings(tmp_path, capsys):
    rows = [GOOD, GOOD | {"query": "other", "pos": ["one", "two"], "neg": []}]
    assert report_of(tmp_path, write(tmp_path / "a.jsonl", *rows)) == (0, [])
    printed = capsys.readouterr().out
    assert "a.jsonl: 2 rows" in printed
    assert "negatives per row: 0 to 1" in printed
    assert "1 file, 2 good rows, 0 findings" in printed


def test_every_kind_of_finding_is_reported_and_fixed(tmp_path, capsys, qwen3):
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    queries = {"1": "which stars are nearest to the sun, and how far away are they?", "2": "an exact one", "3": "train"}
    write(beir / "queries.jsonl", *({"_id": key, "text": text} for key, text in queries.items()))
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\tx\t1\n2\ty\t1\n")
    first = [
        GOOD,
        '{"query": "q", "pos": [], "neg": []}',
        GOOD,
        {"query": "a", "pos": ["p"], "neg": ["p ", "n"]},
        {"query": "an exact one", "pos": ["p1"], "neg": []},
        {"query": "Which stars are nearest to the sun and how far away are they", "pos": ["p2"], "neg": []},
        {"query": "train", "pos": ["p"], "neg": []},
    ]
    paths = [write(tmp_path / "a.jsonl", *first), write(tmp_path / "b.jsonl", GOOD)]
    code, found = report_of(
        tmp_path, *paths, more=["--eval", beir, "--model_name_or_path", qwen3, "--fix", tmp_path / "fix"]
    )
    assert code == 1
    assert found == [
        ["a.jsonl", "2", "pos: found an empty list, wanted at least one passage"],
        ["a.jsonl", "3", "equals an earlier row (line 1)"],
        ["a.jsonl", "4", "1 negative repeats a positive"],
        ["a.jsonl", "5", "the query is in an evaluation set (exact)"],
        ["a.jsonl", "6", "the query is in an evaluation set (near)"],
        ["b.jsonl", "1", f"equals an earlier row ({paths[0]}:1)"],
    ]
    printed = capsys.readouterr().out
    assert f"{paths[0]}:2: pos: found an empty list" in printed
    assert "positives that answer several queries: 1" in printed
    assert "query tokens |" in printed

    assert [json.loads(line) for line in (tmp_path / "fix" / "a.jsonl").read_text().splitlines()] == [
        GOOD,
        {"query": "a", "pos": ["p"], "neg": ["n"]},
        {"query": "train", "pos": ["p"], "neg": []},
    ]
    assert not (tmp_path / "fix" / "b.jsonl").exists()
    log = [line.split("\t")[1:3] for line in (tmp_path / "fix" / "dropped.tsv").read_text().splitlines()]
    assert log == [
        ["2", "dropped"],
        ["3", "dropped"],
        ["4", "changed"],
        ["5", "dropped"],
        ["6", "dropped"],
        ["1", "dropped"],
    ]
    assert report_of(tmp_path, tmp_path / "fix" / "a.jsonl", more=["--eval", beir]) == (0, [])
    with pytest.raises(UserError, match="nothing is overwritten"):
        main([str(paths[0]), "--fix", str(tmp_path / "fix")])


def test_several_processes_report_the_same(tmp_path):
    rows = [{"query": f"q{n}", "pos": [f"p{n} " + "x" * 900], "neg": []} for n in range(3000)]
    rows[2500] = rows[7]
    path = write(tmp_path / "a.jsonl", *rows)  # several blocks
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as out:
        out.write(path.read_bytes()[:-100])
    one = report_of(tmp_path, path, tmp_path / "b.jsonl.gz")
    two = report_of(tmp_path, path, tmp_path / "b.jsonl.gz", more=["--processes", 2])
    assert one == two
    assert one[1][0] == ["a.jsonl", "2501", "equals an earlier row (line 8)"]
    assert len(one[1]) == 1 + 2999 + 1  # b: its cut row, and its other rows repeat those of a


def test_the_rows_before_the_damage_in_a_file_are_read(tmp_path, capsys):
    whole = gzip.compress("".join(json.dumps(GOOD | {"query": f"q{n}"}) + "\n" for n in range(100)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    code, found = report_of(tmp_path, tmp_path / "a.jsonl.gz")
    assert code == 1
    assert found[0][1] == "0" and "cannot be read" in found[0][2]
    assert "a.jsonl.gz: 0 rows" not in capsys.readouterr().out


def test_instructions_that_training_refuses_are_found_with_a_model(tmp_path, qwen3):
    rows = [
        {"query": ["Query:", "runs into the text"], "pos": ["p1"], "neg": []},
        {"query": ["Query: ", "does not"], "pos": [["P:", "p2"]], "neg": []},
        {"query": ["many words " * 40, "no room"], "pos": ["p3"], "neg": []},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    assert report_of(tmp_path, path) == (0, []), "control: only a tokenizer can tell"
    code, found = report_of(tmp_path, path, more=["--model_name_or_path", qwen3, "--query_max_len", "32"])
    assert code == 1 and len(found) == 3
    assert any("'P:' can share a token" in what for _, _, what in found)
    assert any("leaves no room" in what and "many words" in what for _, _, what in found)


def test_what_tells_positives_from_negatives_is_found(tmp_path, capsys):
    rows = [GOOD | {"query": f"q{n}", "prompt": "Q: "} for n in range(10)]
    path = write(tmp_path / "a.jsonl", *rows[:9], rows[9] | {"pos": [["passage: ", "this"]]})
    told = "the instructions tell the positives from the negatives"
    assert report_of(tmp_path, path, more=["--fix", tmp_path / "fix"]) == (1, [["a.jsonl", "10", told]])
    assert len((tmp_path / "fix" / "a.jsonl").read_text().splitlines()) == 10, "only a person can mend it"
    printed = capsys.readouterr().out
    assert "1 row whose instructions tell the positives from the negatives (--fix keeps them)" in printed
    assert 'keys that are not read: "prompt" (10 rows)' in printed
    write(path, *(row | {"pos": ["passage: this"]} for row in rows))
    assert report_of(tmp_path, path) == (1, [["a.jsonl", "0", "the label 'passage:' tells positives from negatives"]])
    write(path, *(row | {"pos": [["P: ", "note: this"]], "neg": [["P: ", "note: that"]]} for row in rows))
    assert report_of(tmp_path, path) == (0, []), "control: all passages have it"


def test_spellings_of_one_instruction_are_shown(tmp_path, capsys):
    rows = [GOOD | {"query": [instruction, "q"], "pos": [instruction]} for instruction in ("Q: ", "q : ", "A: ")]
    assert main([str(write(tmp_path / "a.jsonl", *rows))]) == 0
    assert "one instruction in several spellings: 'Q: ', 'q : '\n" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_gives_one_line(tmp_path, capsys):
    path, report = write(tmp_path / "a.jsonl", GOOD), tmp_path / "a.jsonl" / "report.tsv"
    assert run_verb(main, [str(path), "--report", str(report)]) == 2
    assert capsys.readouterr().err == f"gritlm: error: {path}: File exists\n"
    assert run_verb(main, [str(path), "--report", str(tmp_path / "new" / "report.tsv")]) == 0
    assert (tmp_path / "new" / "report.tsv").exists()


def test_the_report_overwrites_no_file(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(UserError, match="nothing is overwritten"):
        main([str(path), "--report", str(path)])
    assert json.loads(path.read_text()) == GOOD


def test_the_fixed_files_are_complete_or_absent(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", GOOD)
    good, writes = fix.write_good_rows, iter([0, 1])

    def full(*args):
        if next(writes):
            raise OSError(errno.ENOSPC, "No space left on device")
        return good(*args)

    monkeypatch.setattr(fix, "write_good_rows", full)
    command = [str(path), str(write(tmp_path / "b.jsonl", GOOD | {"query": "b"})), "--fix", str(tmp_path / "fix")]
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'fix'}'"):
        main(command)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
    monkeypatch.undo()
    assert main(command) == 0, "control: the disk has room again"


def test_files_that_are_not_read_are_named(tmp_path, capsys):
    for name in ("a.jsonl", "b.json", "test.jsonl", ".hidden"):
        write(tmp_path / name, GOOD)
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "because of their endings: b.json\n" in printed and "test.jsonl\n" in printed
    assert ".hidden" not in printed


def test_rows_that_differ_in_an_instruction_are_not_duplicates(tmp_path):
    rows = [GOOD | {"pos": [[instruction, "this"]], "neg": []} for instruction in ("A: ", "B: ", "A: ")]
    code, found = report_of(tmp_path, write(tmp_path / "a.jsonl", *rows))
    assert (code, found) == (1, [["a.jsonl", "3", "equals an earlier row (line 1)"]])


def test_the_fixed_files_keep_their_names_and_folders(tmp_path):
    for name in ("data/train.jsonl", "data/train.v2.jsonl", "data/x/0.jsonl", "data/y/0.jsonl", "other/train.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, {"query": name, "pos": ["p"], "neg": []}, {"query": name, "pos": ["p"], "neg": ["another row"]})
    table = pa.table({"query": ["t"], "pos": [["p"]], "neg": [["n"]], "at": [nan]})
    pq.write_table(table, tmp_path / "data" / "x" / "1.parquet")
    pq.write_table(table.set_column(0, "query", [["u"]]), tmp_path / "other" / "train.v2.parquet")
    other = [tmp_path / "other" / name for name in ("train.jsonl", "train.v2.parquet")]
    report_of(tmp_path, tmp_path / "data", *other, more=["--fix", tmp_path / "fix"])
    files = (path for path in (tmp_path / "fix").rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(tmp_path / "fix")) for path in files) == [
        "dropped.tsv",
        "train-2.jsonl",
        "train.jsonl",
        "train.v2-2.parquet",
        "train.v2.jsonl",
        "x/0.jsonl",
        "x/1.parquet",
        "y/0.jsonl",
    ]
    assert report_of(tmp_path, tmp_path / "fix") == (0, [])


def test_the_fixed_files_are_not_written_into_the_data(tmp_path):
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data" / "a.jsonl", GOOD)
    with pytest.raises(UserError, match=r"is in .*, and would be read as data"):
        main([str(path.parent), "--fix", str(path.parent / "fix")])
    assert main([str(path), "--fix", str(path.parent / "fix")]) == 0, "control: the data is a file of that folder"


def test_a_parquet_text_that_is_not_utf8_is_found(tmp_path):
    texts = pa.array(["good", "bad"]).view(pa.string())
    broken = pa.Array.from_buffers(pa.string(), 2, [None, texts.buffers()[1], pa.py_buffer(b"good\xff\xfe!")])
    lists = pa.array([["p"], ["p"]])
    pq.write_table(pa.table({"query": broken, "pos": lists, "neg": lists}), tmp_path / "a.parquet")
    code, found = report_of(tmp_path, tmp_path / "a.parquet")
    assert code == 1
    assert "a.parquet:2: found bytes that are not UTF-8" in found[0][2]


def test_only_the_three_columns_of_a_parquet_file_are_read(tmp_path):
    """Another column may hold dates beyond Python's range. A repeated column is refused: one of them would be lost."""
    lists, dates = pa.array([["p"]]), pa.array([2**50], pa.timestamp("s"))
    pq.write_table(pa.table({"query": ["q"], "pos": lists, "neg": lists, "at": dates}), tmp_path / "a.parquet")
    with pytest.raises(OverflowError):
        pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert report_of(tmp_path, tmp_path / "a.parquet", more=["--fix", tmp_path / "fix"])[1][0][1] == "1"
    fixed = pq.read_table(tmp_path / "fix" / "a.parquet")
    assert fixed["at"].equals(pq.read_table(tmp_path / "a.parquet")["at"]) and fixed["neg"].to_pylist() == [[]]
    pq.write_table(pa.table({"query": dates, "pos": lists, "neg": lists}), tmp_path / "b.parquet")
    assert "b.parquet:1: found " in report_of(tmp_path, tmp_path / "b.parquet")[1][0][2]
    twice = pa.Table.from_arrays([pa.array(["q"]), lists, lists, lists], names=["query", "pos", "pos", "neg"])
    pq.write_table(twice, tmp_path / "c.parquet")
    assert "found the column 'pos' twice" in report_of(tmp_path, tmp_path / "c.parquet")[1][0][2]


def test_malformed_files_have_a_finding_at_the_bad_line(shared_data, tmp_path):
    folder, wrong = shared_data / "malformed", []
    (tmp_path / "symlink_loop.jsonl").symlink_to("symlink_loop.jsonl")
    for line in (folder / "EXPECTED.tsv").read_text().splitlines():
        name, number, verdict = line.split("\t")
        path = folder / name if (folder / name).exists() else tmp_path / name
        if name == "no_read_permission.jsonl":
            continue  # root can read it
        try:
            code, found = report_of(tmp_path, path)
        except UserError as error:  # without the file there is nothing to check
            code, found = 2, [[name, "0", str(error)]]
        expected = (code == 0) if verdict == "OK" else (code > 0 and found[0][1] == number)
        if not expected:
            wrong.append((name, number, verdict, code, found[:2]))
    assert not wrong


def test_the_queries_and_documents_of_an_evaluation_set_are_found_apart(tmp_path, capsys):
    query, document = "what is the height of the old brick tower in town", "The tower is 81 metres high."
    write(tmp_path / "eval.jsonl", {"query": query, "pos": [document]})
    rows = [
        (query.upper() + "?", "p1"),
        (query.replace("town", "village"), "p2"),
        ("how high is it", document),
        ("a quiz", query),
        ("of something else", "p3"),
    ]
    path = write(tmp_path / "a.jsonl", *({"query": text, "pos": [passage], "neg": []} for text, passage in rows))
    flags = ["--eval", tmp_path / "eval.jsonl", "--fix", tmp_path / "fix"]
    assert report_of(tmp_path, path, more=flags) == (
        1,
        [
            ["a.jsonl", "1", "the query is in an evaluation set (near)"],
            ["a.jsonl", "3", "a positive is a relevant document of an evaluation set (exact)"],
            ["a.jsonl", "4", "a positive is a query of an evaluation set (exact)"],
        ],
    )
    printed = capsys.readouterr().out
    assert "a relevant document of an evaluation set (exact) (--fix keeps them): line 3\n" in printed
    assert "1 row in which the query is in an evaluation set, but for a word in 6 (similar; no finding)\n" in printed
    fixed = [json.loads(line)["query"] for line in (tmp_path / "fix" / "a.jsonl").read_text().splitlines()]
    assert fixed == [rows[1][0], rows[2][0], rows[4][0]]


# ---- --fix loses nothing


def fixed_by(tmp_path, path) -> list:
    """The rows of the fixed file, and the notes in dropped.tsv. The fixed file must pass."""
    shutil.rmtree(tmp_path / "fix", ignore_errors=True)
    assert report_of(tmp_path, path, more=["--fix", tmp_path / "fix"])[0] == 1
    assert report_of(tmp_path, tmp_path / "fix") == (0, [])
    (fixed,) = (file for file in (tmp_path / "fix").iterdir() if file.name != "dropped.tsv")
    if fixed.suffix == ".parquet":
        rows = pq.read_table(fixed).to_pylist()
    else:
        rows = [json.loads(line) for line in fixed.read_text().splitlines()]
    return rows, [line.split("\t")[3] for line in (tmp_path / "fix" / "dropped.tsv").read_text().splitlines()]


@pytest.mark.parametrize(
    "more, fixed",
    [
        ({"neg_scores": [0.1, 0.9, 0.3], "pos_scores": [0.8]}, {"neg_scores": [0.1, 0.3], "pos_scores": [0.8]}),
        ({"Hard_Negative_IDs": ["a", "b", "c"]}, {"Hard_Negative_IDs": ["a", "c"]}),
        ({"scores": {"pos": [0.8], "neg": [0.1, 0.9, 0.3]}}, {"scores": {"pos": [0.8], "neg": [0.1, 0.3]}}),
        ({"scores": [0.8, 0.1, 0.9, 0.3]}, {"scores": [0.8, 0.1, 0.3]}),
        ({"logits": [0.1, 0.9, 0.3]}, {"logits": [0.1, 0.3]}),
        ({"tags": ["x", "y", "z"], "pos_scores": [1, 2, 3]}, {"tags": ["x", "y", "z"], "pos_scores": [1, 2, 3]}),
        ({"neg_scores": [0.1, 0.9]}, {"neg_scores": []}),
        ({"negative_words": ["not", "no"], "neg_score": 0.5}, {"negative_words": ["not", "no"], "neg_score": 0.5}),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_scores_stay_in_step_with_the_negatives(tmp_path, more, fixed, suffix):
    row, path = {"query": "q", "pos": ["p"], "neg": ["m", "p ", "n"]}, tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        write(path, row | more)
    else:
        pq.write_table(pa.Table.from_pylist([row | more]), path)
    rows, notes = fixed_by(tmp_path, path)
    assert rows == [row | {"neg": ["m", "n"]} | fixed]
    said = "; neg_scores emptied: found 2 for 3 negatives" if fixed == {"neg_scores": []} else ""
    assert notes == ["1 negative repeats a positive" + said]


def test_letters_line_ends_and_other_keys_stay(tmp_path):
    rows = [
        '{"id": 1e3, "query": "Straße 街", "pos": ["ä", "b"], "neg": ["b", "\\u00e9"], "x": "\\ud800"}\r\n',
        '{"query":"\\u8857",  "pos":["c"],"neg":[]}\r\n',
        '{"query": "", "pos": ["c"], "neg": []}\r\n',
        '{"query": "last", "pos": ["c"], "neg": [], "x": null}',
    ]
    (tmp_path / "a.jsonl").write_bytes("".join(rows).encode())
    fixed_by(tmp_path, tmp_path / "a.jsonl")
    lines = (tmp_path / "fix" / "a.jsonl").read_bytes().decode().splitlines(keepends=True)
    assert lines[1:] == [rows[1], rows[3]]
    assert lines[0] == '{"id": 1000.0, "query": "Straße 街", "pos": ["ä", "b"], "neg": ["é"], "x": "\\ud800"}\r\n'


def test_a_parquet_file_keeps_its_schema(tmp_path):
    """Several batches, types that Python or JSON would change, the schema's metadata."""
    n = 2500
    texts = pa.list_(pa.large_string())
    schema = pa.schema(
        {
            "id": pa.uint16(),
            "query": pa.dictionary(pa.int32(), pa.string()),
            "pos": texts,
            "neg": pa.large_list(pa.list_(pa.string())),
            "neg_scores": pa.list_(pa.float32()),
            "at": pa.timestamp("s", "UTC"),
        },
        metadata={"huggingface": "features"},
    )
    rows = {"id": range(n), "query": [f"q{i}" for i in range(n)], "pos": [[f"p{i}"] for i in range(n)]}
    rows["neg"] = [[["I: ", f"n{i}"], ["I: ", f"p{i}" if i % 3 == 0 else "m"]] for i in range(n)]
    rows["pos"][7] = []
    rows["query"][2400], rows["pos"][2400], rows["neg"][2400] = (rows[name][2399] for name in ("query", "pos", "neg"))
    rows |= {"neg_scores": [[0.5, i / n] for i in range(n)], "at": [2**50] * n}
    table = pa.table({name: pa.array(values, schema.field(name).type) for name, values in rows.items()}, schema)
    pq.write_table(table, tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    main([str(tmp_path / "a.parquet"), "--processes", "1", "--fix", str(tmp_path / "fix")])
    fixed = pq.read_table(tmp_path / "fix" / "a.parquet")
    assert fixed.schema.equals(table.schema, check_metadata=True)
    kept = [i for i in range(n) if i not in (7, 2400)]
    assert fixed["id"].to_pylist() == kept and fixed["at"].equals(table["at"].take(kept))
    for name in ("neg", "neg_scores"):
        expected = [values[: 1 if i % 3 == 0 else 2] for i, values in enumerate(table[name].to_pylist())]
        assert fixed[name].to_pylist() == [expected[i] for i in kept]


def test_a_list_of_fixed_size_becomes_a_list_of_any_size(tmp_path):
    two = pa.list_(pa.string(), 2)
    table = pa.table({"query": ["q"], "pos": pa.array([["o", "p"]], two), "neg": pa.array([["p", "n"]], two)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert fixed_by(tmp_path, tmp_path / "a.parquet")[0] == [{"query": "q", "pos": ["o", "p"], "neg": ["n"]}]


def test_a_damaged_file_is_fixed_up_to_the_damage(tmp_path):
    rows = [GOOD | {"query": f"q{n}"} for n in range(3000)]
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes())[:-2000])
    texts = pa.array([row["query"] for row in rows[:1500]] + ["bad"]).view(pa.string())
    size = len("".join(row["query"] for row in rows[:1500]))
    broken = texts.buffers()[2].to_pybytes()[:size] + b"\xff\xfe!"
    queries = pa.Array.from_buffers(pa.string(), 1501, [None, texts.buffers()[1], pa.py_buffer(broken)])
    lists = pa.array([["p"]] * 1501)
    pq.write_table(pa.table({"query": queries, "pos": lists, "neg": pa.array([["n"]] * 1501)}), tmp_path / "c.parquet")
    for name, cut_off in (("b.jsonl.gz", "cannot be read"), ("c.parquet", "found bytes that are not UTF-8")):
        fixed, notes = fixed_by(tmp_path, tmp_path / name)
        assert 900 < len(fixed) < 3000 and [row["query"] for row in fixed] == [f"q{n}" for n in range(len(fixed))]
        assert cut_off in notes[-1]


# ---- what the screen says


def screen_of(capsys, *arguments) -> str:
    main([*map(str, arguments), "--processes", "1"])
    return capsys.readouterr().out


def test_each_kind_of_finding_names_its_first_lines(tmp_path, capsys):
    repeated = [GOOD | {"query": f"q{n}", "neg": ["this"]} for n in range(7)]
    path = write(tmp_path / "a.jsonl", *repeated, GOOD, GOOD)
    printed = screen_of(capsys, path)
    assert "!! 7 rows with negatives that repeat a positive: lines 1, 2, 3, 4, 5 and 2 more\n" in printed
    assert "!! 1 row equal to an earlier row: line 9\n" in printed


def test_many_bad_rows_are_summed_up_by_kind_of_fault(tmp_path, capsys):
    rows = [GOOD | {"query": f"q{n}", "pos": ["a"] * (n % 3) + [""] * (n % 2)} for n in range(100)]
    path = write(tmp_path / "a.jsonl", *rows, "{", '{"query": "q" "pos": []}')
    lines = screen_of(capsys, path).splitlines()
    first = lines.index("bad rows, the first 20 of 69 (--report FILE lists all):")
    assert lines[first + 1] == f"  {path}:1: pos: found an empty list, wanted at least one passage"
    summary = lines[lines.index("bad rows by kind of fault:") + 1 :]
    assert summary[0].startswith(f"  50 rows as {path}:2: pos[1]: found an empty text")
    assert summary[1] == f"  17 rows as {path}:1: pos: found an empty list, wanted at least one passage"
    assert len(lines[first:]) == 1 + 20 + 1 + 1 + 4 + 1
    write(path, *rows[:20])
    assert "by kind" not in screen_of(capsys, path), "control: the screen shows all"


def test_an_instruction_beside_its_text_is_found(tmp_path, capsys):
    def flat(first, rows=range(3)):
        return [{"query": f"q{n}", "pos": [first, f"p{n}"], "neg": [first, f"n{n}"]} for n in rows]

    path = write(tmp_path / "a.jsonl", *flat("A passage; "))
    code, found = report_of(tmp_path, path, more=["--fix", tmp_path / "fix"])
    assert code == 1 and [what.split(";")[0] for _, _, what in found] == [
        f"{name}: found the same text first in 3 of 3 rows, 'A passage" for name in ("neg", "pos")
    ]
    assert (tmp_path / "fix" / "a.jsonl").read_bytes() == path.read_bytes(), "its negatives are no repeats"
    tasks = [row for n in range(20) for row in flat(f"Task {n}; ", range(10 * n, 10 * n + 10))]
    assert "Task 0" in report_of(tmp_path, write(path, *tasks))[1][0][2]
    write(path, *({"query": f"q{n}", "pos": [["A passage; ", f"p{n}"]], "neg": []} for n in range(3)))
    assert report_of(tmp_path, path) == (0, []), "control: an instruction in its place"
    shared = [{"query": f"q{n}", "pos": [f"all {n // 3}", f"p{n}"], "neg": [f"m{n}", "n"]} for n in range(30)]
    assert report_of(tmp_path, write(path, *shared)) == (0, []), "control: a few queries share a positive"
    assert report_of(tmp_path, write(path, *flat("a passage")[:2]))[1][0][2] == "1 negative repeats a positive"


def test_a_label_that_is_not_read_is_found(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", GOOD | {"label": 0, "split": "test", "neg_scores": [0.1], "id": 1})
    code, found = report_of(tmp_path, path)
    assert code == 1 and [what.split(":")[0] for _, _, what in found] == ["label", "split"]
    assert report_of(tmp_path, path, more=["--ignore_columns", "label"])[1][0][2].startswith("split: found a key")
    assert report_of(tmp_path, path, more=["--ignore_columns", "label,split"]) == (0, [])
    pq.write_table(pa.Table.from_pylist([GOOD | {"query": "q", "is_duplicate": 0}]), tmp_path / "b.parquet")
    assert "is_duplicate" in report_of(tmp_path, tmp_path / "b.parquet")[1][0][2]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ((0, 1, 0), True),
        ((True, False, None, True), True),
        (("Entailment", "neutral ", "neutral"), True),
        ((["0", "1"], ["1"], ["1"]), True),
        (([1, 0], [1, 0], [1, 0]), True),
        (("train", "test", "test"), True),
        ((1, 1, 1), False),
        ((0, 1, 2), False),
        (("yes", "no", "a text"), False),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_label_is_found_by_its_values(tmp_path, values, found, suffix):
    rows = [GOOD | {"query": f"q{number}", "seen": value} for number, value in enumerate(values)]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    else:
        write(tmp_path / "a.jsonl", *rows)
    _, findings = report_of(tmp_path, tmp_path / f"a.{suffix}")
    assert [what[:17] for _, _, what in findings] == ["seen: found a key"] * found


# ---- random files

_texts = st.one_of(st.text(max_size=6), st.sampled_from(["", " ", "p", "\ud800", "\u2028", "\x00", "p "]))
_scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _texts)
_lists = st.lists(_scalars, max_size=3)
_anything = st.one_of(
    _scalars,
    st.lists(st.one_of(_scalars, _lists), max_size=3),
    st.dictionaries(_texts, st.one_of(_scalars, _lists), max_size=2),
)
_passages = st.one_of(st.lists(st.one_of(_texts, st.lists(_texts, max_size=3)), max_size=3), _anything)
_rows = st.one_of(
    st.fixed_dictionaries({"query": st.one_of(_texts, _anything), "pos": _passages, "neg": _passages}),
    st.just(GOOD),
    _anything,
)
_lines = st.one_of(_rows.map(lambda row: json.dumps(row).encode()), st.binary(max_size=30))
_files = st.lists(_lines, max_size=5).map(b"\n".join)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(_files, st.sampled_from([".jsonl", ".jsonl.gz", ".parquet"]), st.booleans())
def test_a_random_file_has_findings_exactly_where_the_loader_refuses_it(tmp_path, content, suffix, zipped):
    """1,000 files. Nothing but a `UserError` may be raised; the check's first finding is the loader's error."""
    path = tmp_path / f"random{suffix}"
    path.unlink(missing_ok=True)  # much faster than to truncate it
    path.write_bytes(gzip.compress(content)[: -1 if len(content) % 7 == 0 else None] if zipped else content)
    (report,) = check([path], None, None, MAX_LENGTHS, 1)
    for line in (*describe_file(report, "characters", MAX_LENGTHS), *(why for _, _, why in report.stats.found)):
        line.encode()  # can be printed
    refused = [f"{path}:{line}: {why}" for line, kind, why in report.stats.found if kind == "bad"] + report.problems
    try:
        for block in read_blocks(path):
            parse_block(path, block)
        assert not refused
    except UserError as error:
        assert str(error) == refused[0]
