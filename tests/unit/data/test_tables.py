"""Files of rows: what separates them, quotation marks, broken rows, JSON arrays, compression."""

import bz2
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gritlm.data.containers import FileError
from gritlm.data.raw import BadRows
from gritlm.data.tables import objects, read_rows
from gritlm.errors import UserError

HEADER = "query,positive\n"
PAIR = {"query": "what, exactly, is rain", "positive": 'She said "water" falls.'}
QUOTED = '"what, exactly, is rain"{0}"She said ""water"" falls."\n'


def rows_of(path, content, bad=None, **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row for _, row in read_rows(path, bad or BadRows(), **options)]


READ = {  # name of the file, its text, its rows as lists of values
    "comma": ("a.csv", HEADER + QUOTED.format(","), [[*PAIR.values()]]),
    "spaces after commas": (
        "a.csv",
        "query, positive\n" + QUOTED.format(", ") + "a, b\n",
        [[*PAIR.values()], ["a", "b"]],
    ),
    "semicolon": (
        "a.csv",
        "query;positive\nwhere, exactly;By the mill, east.\n",
        [["where, exactly", "By the mill, east."]],
    ),
    "pipe": ("a.csv", "query|positive\na,x|b\n", [["a,x", "b"]]),
    "tab in .csv": ("a.csv", "query\tpositive\na,x\tb\n", [["a,x", "b"]]),
    "Excel's sep=": ("a.csv", "sep=;\nquery;positive\na,x;b\n", [["a,x", "b"]]),
    "tab in .txt": ("a.txt", "query\tpositive\na, x\tb\n", [["a, x", "b"]]),
    "upper case": ("A.CSV", HEADER + "a,b\n", [["a", "b"]]),
    "byte order mark": ("a.csv", "\ufeff" + HEADER + "a,b\n", [["a", "b"]]),
    "line ends of Windows": ("a.csv", "query,positive\r\na,b\r\n\r\nc,d\r\n", [["a", "b"], ["c", "d"]]),
    "line ends of old Macs": ("a.csv", "query,positive\ra,b\r", [["a", "b"]]),
    "over several lines": ("a.csv", HEADER + 'a,"b\nc"\nd,e\n', [["a", "b\nc"], ["d", "e"]]),
    "backslashes": ("a.csv", HEADER + '"say \\"hi\\" now",\'x\'\n', [['say "hi" now', "'x'"]]),
    "quotes in .tsv": ("a.tsv", "query\tpositive\n" + QUOTED.format("\t"), [[*PAIR.values()]]),
    "plain quotes in .tsv": (
        "a.tsv",
        'query\tpositive\n5" pipe\ta\n"big" boat\tb\n"open\tc\nq "x"\td\nlast"\te\n',
        [['5" pipe', "a"], ['"big" boat', "b"], ['"open', "c"], ['q "x"', "d"], ['last"', "e"]],
    ),
    "a column without a name": ("a.csv", ",query,positive\n0,a,b\n", [["0", "a", "b"]]),
}


@pytest.mark.parametrize("case", READ)
def test_separated_text(tmp_path, case):
    name, content, wanted = READ[case]
    assert [[*row.values()] for row in rows_of(tmp_path / name, content)] == wanted


BROKEN = {  # a file with faults -> its good rows, the lines that are named
    "text after a quote": ('q1,p1\nq2,"p2" x\nq3,p3\n', "q1 q3", [3]),
    "a quote at the start": ('"big" boat,x\nq2,p2\n', "q2", [2]),
    "a quote that is not closed": ('q1,"p1\nq2,p2\nq3,"p3"\nq4,p4\n', "q2 q3 q4", [2]),
    "a quote that is not closed, to the end": ('q1,"p1\nq2,p2\n', "q2", [2]),
    "too many columns over two lines": ('q1,"a\nb",x\nq2,p2\n', "q2", [2]),
    "the other end of a broken field": ('q1,"a" x "\nb",y\nq2,p2\n', "q2", [2, 3]),
    "the header again after a byte order mark": ("q1,p1\n\ufeff" + HEADER + "q2,p2\n", "q1 q2", [3]),
    "the header again": ("q1,p1\n" + HEADER + "query,positive x\nq2,p2\n", "q1 query q2", [3]),
    "not UTF-8": ("caf\udce9,x\nq2,p2\n", "q2", [2]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_one_bad_row(tmp_path, case):
    content, good, lines = BROKEN[case]
    bad = BadRows(skip=True)
    found = rows_of(tmp_path / "a.csv", (HEADER + content).encode(errors="surrogateescape"), bad)
    assert [row["query"] for row in found] == good.split()
    assert [int(message.split(":")[1]) for message in bad.messages] == lines
    with pytest.raises(UserError, match=rf"a\.csv:{lines[0]}: found .*HINT"):
        [*read_rows(tmp_path / "a.csv", BadRows(hint=" HINT"))]


REFUSED = {
    "one column": ("a.txt", "one\ntwo\n", "a.txt:1: found 1 column, wanted at least 2, separated by comma, tab,"),
    "a header for rows": ("a.csv", HEADER, r"a.csv:1: found the column names query, positive, wanted a row \(--no_"),
    "usual names for rows": ("a.csv", "Question,passage\n", "a.csv:1: found the column names Question, passage, want"),
    "names and a label for rows": ("a.tsv", "sentence1\tsentence2\tgold\n", "a.tsv:1: found the column names sente"),
    "four columns": ("a.csv", "a,b,c,d\n", "a.csv:1: found 4 columns, wanted 2 or 3"),
    "a column twice": (
        "a.csv",
        "query,query\n",
        "a.csv:1: found the column 'query' twice, wanted it once; --no_header",
    ),
    "a broken header": ("a.csv", '"query,positive\n', "a.csv:1: found unexpected end of data, wanted comma-separated"),
    "another ending": ("a.dat", "a,b\n", "a.dat: found another ending, wanted one of .csv, .tsv, .tab, .txt, .jsonl"),
    "a zip archive": ("a.csv", "PK\x03\x04 ", "a.csv: found a zip archive"),
    "an object over lines": ("a.json", '{\n"data": [{"query": "a"}]\n}', "a.json: found one JSON object over several"),
    "a broken array": ("a.json", '[{"query": "a"},\n', "a.json: found .* in one JSON array, wanted one object a line"),
    "nothing": ("a.jsonl", "\n", "a.jsonl: found no row"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_fault_of_the_whole_file_is_not_skipped(tmp_path, case):
    name, content, message = REFUSED[case]
    options = {"no_header": True} if case == "four columns" or case.endswith("for rows") else {}
    with pytest.raises(FileError, match=message) as raised:
        rows_of(tmp_path / name, content, BadRows(skip=True, hint=" HINT"), **options)
    assert "HINT" not in str(raised.value) and "\n" not in str(raised.value)


def test_no_header(tmp_path):
    found = rows_of(tmp_path / "a.csv", "a,b,c\nd,e,f\n", no_header=True)
    assert found == [dict(zip(("query", "positive", "negative"), row, strict=True)) for row in ("abc", "def")]
    assert len(rows_of(tmp_path / "a.csv", "a,b,c\nd,e,f\n")) == 1, "control"
    for name in ("a.csv", "a.tsv", "a.txt"):
        found = rows_of(tmp_path / name, "what, then\ttext\nwho, now\tshe\n", no_header=True)
        assert [row["query"] for row in found] == ["what, then", "who, now"], name
    found = rows_of(tmp_path / "a.csv", "what,a\tb\nwho,c\n", no_header=True)
    assert [row["positive"] for row in found] == ["a\tb", "c"], "control: a tab in some texts separates nothing"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_lines_and_arrays(tmp_path, name):
    rows = [{"query": "a", "positive": "b"}, {"query": "c", "positive": "d"}]
    for content in ("\n".join(map(json.dumps, rows)), json.dumps(rows), json.dumps(rows, indent=1)):
        assert rows_of(tmp_path / name, content) == rows
        assert rows_of(tmp_path / name, "\ufeff" + content) == rows
    pairs = [["a", "b"], ["c", "d"]]
    for content in ("\n".join(map(json.dumps, pairs)), json.dumps(pairs)):
        assert rows_of(tmp_path / name, content) == pairs
    assert rows_of(tmp_path / name, '["a", "b"]\n') == [["a", "b"]], "one bare array is one row"
    bad = BadRows(skip=True)
    assert rows_of(tmp_path / name, '{"query": 1}\n{"query": \n[1]\n', bad) == [{"query": 1}, [1]]
    assert [*objects(read_rows(tmp_path / name, bad), bad)] == [(f"{tmp_path / name}:1", {"query": 1})]
    assert "found [1], wanted an object with named fields" in bad.messages[-1]


def test_compressed_and_parquet(tmp_path):
    table = io.BytesIO()
    pq.write_table(pa.table({"query": ["a"], "positive": ["b"]}), table)
    content, wanted = (HEADER + "a,b\n").encode(), [{"query": "a", "positive": "b"}]
    for name, data in {
        "a.csv.gz": gzip.compress(content),
        "a.CSV.BZ2": bz2.compress(content),
        "a.csv.xz": lzma.compress(content),
        "b.csv": gzip.compress(content),
        "a.csv.zst": pa.compress(content, codec="zstd", asbytes=True),
        "A.PARQUET": table.getvalue(),
    }.items():
        assert rows_of(tmp_path / name, data) == wanted, name
    with pytest.raises(FileError, match=r"a\.csv\.gz: cannot be read"):
        rows_of(tmp_path / "a.csv.gz", gzip.compress(content + b"a,b\n" * 9000)[:-20])
