"""prepare loses no row, holds out queries that do not leak into train, and names bad input."""

import csv
import gzip
import json
import random
import re
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gritlm.curation import held_out_rows, row_spool
from gritlm.curation.held_out_rows import write_held_out
from gritlm.curation.prepare import main
from gritlm.data import columns
from gritlm.data.records import load_records
from gritlm.errors import UserError
from gritlm.models.text import Text

PAIRS = [{"question": f"what is {n}?", "answer": f'the "number", {n}\nand more', "id": n} for n in range(6)]


def rows_of(folder, name="data") -> list[dict]:
    return [json.loads(line) for line in (folder / "train" / f"{name}.jsonl").read_text().splitlines()]


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(params=["csv", "tsv", "jsonl", "parquet"])
def pairs_file(request, tmp_path):
    """The same pairs in a file of each kind."""
    path = tmp_path / f"data.{request.param}"
    if request.param == "csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as out:
            writer = csv.DictWriter(out, ["question", "answer", "id"])
            writer.writeheader()
            writer.writerows(PAIRS)
    elif request.param == "tsv":
        lines = [
            "question\tanswer\tid",
            *(f"{p['question']}\t{p['answer']}\t{p['id']}".replace("\n", " ") for p in PAIRS),
        ]
        write(path, "\n".join(lines) + "\n")
    elif request.param == "jsonl":
        write(path, "".join(json.dumps(pair) + "\n" for pair in PAIRS))
    else:
        pq.write_table(pa.Table.from_pylist(PAIRS), path)
    return path


def test_every_file_format_gives_the_same_rows(pairs_file, tmp_path):
    assert main([str(pairs_file), str(tmp_path / "out"), "--instruction", "Answer it", "--licence", "MIT"]) == 0
    rows = rows_of(tmp_path / "out")
    assert [row["query"] for row in rows] == [["Instruct: Answer it\nQuery: ", p["question"]] for p in PAIRS]
    wanted = [p["answer"].replace("\n", " ") if pairs_file.suffix == ".tsv" else p["answer"] for p in PAIRS]
    assert [row["pos"] for row in rows] == [[text] for text in wanted]
    (records,) = load_records(tmp_path / "out" / "train", tmp_path / "cache")
    assert records[3].query == Text("Instruct: Answer it\nQuery: ", "what is 3?")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "licence: MIT" in card and "train: 6 rows" in card


def test_triples_and_negative_columns_become_rows(tmp_path):
    write(tmp_path / "data.tsv", 'q1\tp1\tn1\nq2 "\tp2\tn2\nq1\tp1\tn3\nq1\tp1\tn1\n')
    main([str(tmp_path / "data.tsv"), str(tmp_path / "out"), "--no_header"])
    assert rows_of(tmp_path / "out") == [
        {"query": "q1", "pos": ["p1"], "neg": ["n1", "n3"]},
        {"query": 'q2 "', "pos": ["p2"], "neg": ["n2"]},
    ]
    row = {"anchor": "q", "positive": ["p", "r"], "negative_1": "n1", "negative_2": "p", "negative_10": None}
    write(tmp_path / "more.jsonl", json.dumps(row) + "\n" + json.dumps(row) + "\n")
    main([str(tmp_path / "more.jsonl"), str(tmp_path / "two")])
    assert rows_of(tmp_path / "two", "more") == [{"query": "q", "pos": ["p", "r"], "neg": ["n1"]}]
    assert "left out: 1 repeated rows;" in (tmp_path / "two" / "README.md").read_text()


def beir(folder):
    (folder / "qrels").mkdir(parents=True)
    write(
        folder / "queries.jsonl", "".join(json.dumps({"_id": f"q{n}", "text": f"query {n}"}) + "\n" for n in range(3))
    )
    passages = [{"_id": f"d{n}", "title": "T" * (n % 2), "text": f"passage {n}"} for n in range(4)]
    write(folder / "corpus.jsonl", "".join(json.dumps(passage) + "\n" for passage in passages))
    write(folder / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\nq0\td1\t1\nq0\td2\t1\nq1\td3\t0\nq2\td0\t2\n")
    return folder


def test_the_positives_of_a_beir_query_are_its_relevant_passages(tmp_path):
    main([str(beir(tmp_path / "set")), str(tmp_path / "out")])
    assert rows_of(tmp_path / "out", "set") == [
        {"query": "query 0", "pos": ["T passage 1", "passage 2"], "neg": []},
        {"query": "query 2", "pos": ["passage 0"], "neg": []},
    ]
    with pytest.raises(UserError, match="found the splits train"):
        main([str(tmp_path / "set"), str(tmp_path / "other"), "--split", "test"])
    write(tmp_path / "set" / "qrels" / "bad.tsv", "query-id\tcorpus-id\tscore\nq0\td9\t1\nq0\td1\t1\n")
    with pytest.raises(UserError, match=r"bad\.tsv:2: found the id 'd9'"):
        main([str(tmp_path / "set"), str(tmp_path / "other"), "--split", "bad"])


@pytest.mark.parametrize(
    ("name", "line", "found"),
    [
        ("qrels/train.tsv", "q0\td9\t1", r"train\.tsv:6: found the id 'd9'"),
        ("qrels/train.tsv", "q0 d1 1", r"train\.tsv:6: found 'q0 d1 1'"),
        ("corpus.jsonl", '{"_id": "d9"', r"corpus\.jsonl:5: found "),
    ],
)
def test_bad_lines_of_a_beir_folder_can_be_skipped(tmp_path, name, line, found):
    folder = beir(tmp_path / "set")
    with open(folder / name, "a") as out:
        out.write(line + "\n")
    with pytest.raises(UserError, match=found):
        main([str(folder), str(tmp_path / "out")])
    main([str(folder), str(tmp_path / "out"), "--skip_bad"])
    assert len(rows_of(tmp_path / "out", "set")) == 2
    assert len((tmp_path / "out" / "skipped.txt").read_text().splitlines()) == 1
    (folder / "qrels" / "train.tsv").write_bytes(b"q0\td\xff\t1\n")
    with pytest.raises(UserError, match=r"train\.tsv: found .* wanted tab-separated UTF-8 text"):
        main([str(folder), str(tmp_path / "other"), "--skip_bad"])


def test_the_default_name_is_the_name_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(beir(tmp_path / "set"))
    main([".", str(tmp_path / "out")])
    assert len(rows_of(tmp_path / "out", "set")) == 2
    for flag, value in (("--name", "a/b"), ("--name", ".hidden"), ("--held_out", "-1")):
        with pytest.raises(UserError, match=f"{flag} .*wanted"):
            main([".", str(tmp_path / "other"), flag, value])


def test_no_held_out_text_is_in_train(tmp_path):
    """Rows share passages, also through other rows, and negatives are positives of other rows."""
    rng = random.Random(0)
    rows = []
    for n in range(400):
        pos = [f"d{rng.choice([n, n, n, n - 1, 7])}" for _ in range(rng.randint(1, 2))]
        rows.append({"query": f"q{n if n % 9 else n + 1}", "positive": pos, "negatives": [f"d{rng.randrange(400)}"]})
    write(tmp_path / "data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    main([str(tmp_path / "data.jsonl"), str(tmp_path / "out"), "--held_out", "60"])
    train, held = rows_of(tmp_path / "out"), tmp_path / "out" / "held_out"
    texts = {row["_id"]: row["text"] for row in map(json.loads, (held / "corpus.jsonl").read_text().splitlines())}
    queries = {row["text"] for row in map(json.loads, (held / "queries.jsonl").read_text().splitlines())}
    pairs = [line.split("\t") for line in (held / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    relevant = {texts[passage] for _, passage, _ in pairs}
    assert 40 <= len({query for query, _, _ in pairs}) <= 60
    assert not relevant & {text for row in train for name in ("pos", "neg") for text in row[name]}
    assert not queries & {row["query"] for row in train}
    assert len(train) + len({query for query, _, _ in pairs}) >= 390  # less the repeated rows
    order = random.Random(1).sample(rows, len(rows))  # control: a split by row
    careless = {text for row in order[:60] for text in row["positive"]}
    assert careless & {text for row in order[60:] for text in row["positive"]}


def test_a_held_out_query_with_several_rows_is_written_once(tmp_path):
    rows = [{"query": "q", "pos": [f"p{n}", "p0"], "neg": ["p0", "n"]} for n in range(3)]
    write_held_out(tmp_path, rows)
    assert (tmp_path / "queries.jsonl").read_text() == '{"_id": "q0", "text": "q"}\n'
    lines = (tmp_path / "qrels" / "test.tsv").read_text().splitlines()
    assert lines[1:] == [f"q0\td{n}\t1" for n in (0, 2, 3)]  # d1 is the negative


def test_a_held_out_query_or_positive_is_removed_from_the_negatives_of_train(tmp_path):
    rows = [
        {"query": "q", "pos": ["p"], "neg": []},
        {"query": "other", "pos": ["r"], "neg": ["q", "p", "P!", "s"], "neg_scores": [0.1, 0.2, 0.3, 0.4]},
    ]
    path = write(tmp_path / "data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(9):
        main([str(path), str(tmp_path / f"out{seed}"), "--held_out", "1", "--seed", str(seed)])
    trained = [rows_of(tmp_path / f"out{seed}") for seed in range(9)]
    (number, *_) = [seed for seed, made in enumerate(trained) if made[0]["query"] == "other"]
    assert trained[number] == [{"query": "other", "pos": ["r"], "neg": ["s"], "neg_scores": [0.4]}]
    assert "0 rows and 3 negatives" in (tmp_path / f"out{number}" / "README.md").read_text()


def written(path, rows):
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.casefold()).strip()


LONG = "the old ferry of the harbour leaves from pier six at noon, and it comes back at dusk with number"


def test_no_near_copy_of_a_held_out_text_is_in_train(tmp_path, monkeypatch):
    """Twins that differ in case and punctuation, or in one word of many."""
    rows = []
    for n in range(30):
        passage = f"{LONG} {n}{n} of its {n * 7} passengers {n * 13}"
        rows.append({"query": f"What is thing {n}?", "pos": [passage]})
        rows.append({"query": f"what is thing {n}", "pos": [f"another {n}"]})
        rows.append({"query": f"which ferry {n}?", "pos": [passage.replace("dusk", "dawn")]})
    path = written(tmp_path / "data.jsonl", rows)

    def in_train(out) -> list[str]:
        assert main([str(path), str(tmp_path / out), "--held_out", "20"]) == 0
        held = (tmp_path / out / "held_out" / "queries.jsonl").read_text().splitlines()
        held_queries = {json.loads(line)["text"] for line in held}
        assert len(held_queries) > 10
        passages = {plain(row["pos"][0]).replace("dawn", "dusk") for row in rows if row["query"] in held_queries}
        return [
            row["query"]
            for row in rows_of(tmp_path / out)
            if plain(row["query"]) in map(plain, held_queries)
            or plain(row["pos"][0]).replace("dawn", "dusk") in passages
        ]

    assert in_train("out") == []
    assert re.search(r"left out of train for that.*: \d+ rows and", (tmp_path / "out" / "README.md").read_text())
    monkeypatch.setattr(held_out_rows, "_find_copies", lambda *_: np.zeros((0, 3), dtype=np.int64))
    assert in_train("control") != []


def test_a_row_with_near_copies_in_many_rows_is_not_held_out(tmp_path, monkeypatch):
    """30 queries that differ in punctuation alone: to hold one of them out would cost the others."""
    rows = [{"query": "what is it" + "?" * n, "pos": [f"passage {n}"]} for n in range(30)]
    rows += [{"query": f"question {n}", "pos": [f"answer {n}"]} for n in range(30)]
    calls, find = [], held_out_rows._find_copies
    monkeypatch.setattr(held_out_rows, "_find_copies", lambda *given: calls.append(0) or find(*given))
    main([str(written(tmp_path / "data.jsonl", rows)), str(tmp_path / "out"), "--held_out", "20"])
    assert len(calls) == 2, "not once for each of these rows"
    held = (tmp_path / "out" / "held_out" / "queries.jsonl").read_text()
    assert "what is it" not in held and 5 <= held.count("question") <= 20
    assert len(rows_of(tmp_path / "out")) + held.count("question") == 60
    first = [row["query"] for row in rows_of(tmp_path / "out")][:30]
    assert first == [row["query"] for row in rows[:30]]


@pytest.mark.parametrize("bucket", [1, 300, 64_000_000])
def test_rows_are_merged_on_disk_as_in_memory(tmp_path, monkeypatch, bucket):
    rng = random.Random(0)
    rows = []
    for n in range(500):
        negatives = rng.sample(range(40), rng.randint(0, 3))
        row = {"query": f"q{rng.randrange(120)}", "pos": ["p"], "neg": [f"n{k}" for k in negatives]}
        rows.append(row | ({"neg_scores": [k / 8 for k in negatives]} if n % 3 else {}))
    wanted: dict[str, dict] = {}
    for row in rows:
        known = wanted.setdefault(row["query"], {})
        for negative, score in zip(row["neg"], row.get("neg_scores", [None] * 3), strict=False):
            known.setdefault(negative, score)
    monkeypatch.setattr(row_spool, "BUCKET_BYTES", bucket)
    main([str(written(tmp_path / "data.jsonl", rows)), str(tmp_path / "out")])
    made = {
        r["query"]: dict(zip(r["neg"], r.get("neg_scores", [None] * 99), strict=False))
        for r in rows_of(tmp_path / "out")
    }
    assert list(made) == list(wanted) and made == wanted, "and in the order of the first row of each query"
    assert not list((tmp_path / "out").rglob("*bucket*")) and not (tmp_path / "out" / "temporary").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    counts = [int(re.search(pattern, card)[1]) for pattern in (r"left out: (\d+) repeated", r"merged: (\d+) rows")]
    assert sum(counts) == 500 - len(wanted) and min(counts) > 10


def test_memory_holds_no_text_of_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "SURVEYED", 50)
    rows = [{"query": f"q{n}", "pos": [f"{n} {LONG * 30}"], "neg": [f"n{n}"]} for n in range(1500)]
    rows += [{**rows[n], "neg": [f"m{n}"]} for n in range(0, 1500, 40)]
    path = written(tmp_path / "data.jsonl", rows)
    tracemalloc.start()
    main([str(path), str(tmp_path / "out")])
    peak = tracemalloc.get_traced_memory()[1]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    control = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 < path.stat().st_size < control and len(lines) == len(rows)


# ---- instructions


def instructed(tmp_path, *flags, **row) -> dict:
    path = written(tmp_path / "data.jsonl", [{"query": "what is rain", "pos": ["water"], "neg": ["a loaf"]} | row])
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    main([str(path), str(out), *flags])
    return rows_of(out)[0]


def test_instructions_of_queries_and_passages(tmp_path):
    row = instructed(tmp_path, "--instruction_template", "query: ", "--passage_instruction", "passage: ")
    assert row == {
        "query": ["query: ", "what is rain"],
        "pos": [["passage: ", "water"]],
        "neg": [["passage: ", "a loaf"]],
    }
    template = ["--instruction", "Find it", "--instruction_template", r"Task: {instruction}\nQ: "]
    assert instructed(tmp_path, *template)["query"] == ["Task: Find it\nQ: ", "what is rain"]
    assert instructed(tmp_path, "--instruction", "query: ")["query"] == ["query: ", "what is rain"], "whole"


@pytest.mark.parametrize("before", ["Instruct: Find it\nQuery: ", "Find it: ", "Find it "])
def test_an_instruction_in_the_text_is_not_put_there_twice(tmp_path, before):
    query = instructed(tmp_path, "--instruction", "Find it", query=f"{before}what is rain")["query"]
    assert query == [before, "what is rain"]
    (card,) = tmp_path.glob("out*/README.md")
    assert "1 texts that begin with their instruction" in card.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--instruction", "x", "--instruction_template", "query: "], "wanted {instruction} in it"),
        (["--instruction_template", "{instruction}: "], "wanted --instruction"),
        (["--instruction_template", "{task}: "], "no other braces"),
        (["--instruction_template", "query:"], "wanted white space at its end"),
        (["--passage_instruction", "passage:"], "wanted white space at its end"),
        (["--passage_instruction", "passage: ", "--skip_bad"], "data.jsonl:1 has the instruction 'doc: ' already"),
    ],
)
def test_instructions_that_would_be_lost_are_refused(tmp_path, flags, message):
    with pytest.raises(UserError) as error:
        instructed(tmp_path, *flags, pos=[["doc: ", "water"]])
    assert message in str(error.value) and "--skip_bad" not in str(error.value)


def test_data_that_cannot_be_split_is_refused(tmp_path):
    path = write(
        tmp_path / "data.jsonl", "".join(json.dumps({"query": f"q{n}", "positive": "p"}) + "\n" for n in range(9))
    )
    with pytest.raises(UserError, match="found no row that shares no query and no positive with others"):
        main([str(path), str(tmp_path / "out"), "--held_out", "3"])
    assert main([str(path), str(tmp_path / "out")]) == 0, "control"
    path = write(tmp_path / "one.jsonl", json.dumps({"query": "q", "positive": "p"}) + "\n")
    with pytest.raises(UserError, match="no row left to train on"):
        main([str(path), str(tmp_path / "two"), "--held_out", "1"])


def test_a_flag_for_another_kind_of_input_is_refused(tmp_path):
    path = write(tmp_path / "data.jsonl", json.dumps({"query": "q", "positive": "p"}) + "\n")
    folder = beir(tmp_path / "set")
    for source, flags in (
        (path, ["--no_header"]),
        (path, ["--split", "test"]),
        (folder, ["--config", "x"]),
        (folder, ["--query_column", "text"]),
        (f"hub:{folder}", ["--no_header"]),
    ):
        with pytest.raises(UserError, match=f"{flags[0]} has no effect on |\\({flags[0]}\\)"):
            main([str(source), str(tmp_path / "out"), *flags])
    with pytest.raises(UserError, match="--seed -1: wanted 0 or more"):
        main([str(path), str(tmp_path / "out"), "--seed", "-1"])


@pytest.mark.parametrize("name", ["data.csv", "data.tsv.gz"])
def test_a_line_that_is_not_utf8_is_refused_or_skipped(tmp_path, name):
    comma = "," if "csv" in name else "\t"
    lines = [f"query{comma}positive", f"q{comma}p", f"caf\xe9{comma}p2", *(f"q{n}{comma}p{n}" for n in range(3, 999))]
    content = "\n".join(lines).encode("latin-1") + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UserError, match=f"{name}:3: found byte 0xE9, wanted UTF-8 text"):
        main([str(tmp_path / name), str(tmp_path / "out")])
    main([str(tmp_path / name), str(tmp_path / "out"), "--skip_bad"])
    assert len(rows_of(tmp_path / "out")) == 997


def test_a_repeated_column_or_id_is_refused_or_skipped(tmp_path):
    path = write(tmp_path / "data.csv", "query,positive,positive\nq,p,r\n")
    with pytest.raises(UserError, match=r"data\.csv:1: found the column 'positive' twice"):
        main([str(path), str(tmp_path / "out")])
    folder = beir(tmp_path / "set")
    with open(folder / "corpus.jsonl", "a") as out:
        out.write(json.dumps({"_id": "d0", "text": "another"}) + "\n")
    with pytest.raises(UserError, match=r"corpus\.jsonl:5: found the _id 'd0' a second time"):
        main([str(folder), str(tmp_path / "out")])
    main([str(folder), str(tmp_path / "out"), "--skip_bad"])
    assert rows_of(tmp_path / "out", "set")[1]["pos"] == ["passage 0"]


def test_dropped_negatives_are_counted(tmp_path):
    row = {"query": "q", "positive": "p", "negatives": ["n", "n ", "p", "p", "m"]}
    path = write(tmp_path / "data.jsonl", json.dumps(row) + "\n")
    main([str(path), str(tmp_path / "out")])
    (made,) = rows_of(tmp_path / "out")
    assert made["neg"] == ["n", "m"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 negatives that repeat a positive of their row; 1 repeated negatives;" in card


def test_a_folder_with_a_similar_name_is_left_alone(tmp_path):
    path = write(tmp_path / "data.csv", "query,positive\nq,p\n")
    (tmp_path / "out.part").mkdir()
    main([str(path), str(tmp_path / "out")])
    assert (tmp_path / "out.part").is_dir()


BAD = {
    "no such column": ("a,b\n1,2\n", "data.csv: found the columns a, b; wanted one of query, anchor"),
    "empty positive": ("query,positive\nq,p\nq,\n", "data.csv:3: positive: found an empty text"),
    "too many columns": ("query,positive\nq,p,x\n", "data.csv:2: found 3 columns, wanted 2"),
    "no row": ("query,positive\n", "data.csv: found no row"),
    "open quote": ('query,positive\nq,"p\n', "data.csv:2: found unexpected end of data, wanted comma-separated"),
    "text after a quote": ('query,positive\nq,"p"x\n', "data.csv:2: found ',' expected after"),
    "a row over lines": ('query,positive\nq,"p\np"\nq,"a\nb",x\n', "data.csv:4: found 3 columns, wanted 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_error_names_the_place_in_bad_input(tmp_path, name):
    content, message = BAD[name]
    path = write(tmp_path / "data.csv", content)
    with pytest.raises(UserError) as error:
        main([str(path), str(tmp_path / "out")])
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_skipped_rows_are_listed(tmp_path):
    path = write(tmp_path / "data.csv", "query,positive\nq,p\nr,\n")
    main([str(path), str(tmp_path / "out"), "--skip_bad"])
    assert len(rows_of(tmp_path / "out")) == 1
    assert "data.csv:3: positive: found an empty text" in (tmp_path / "out" / "skipped.txt").read_text()


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b"query,positive\nq,p\n" * 99)[:40]], ids=["no gzip", "cut off"]
)
def test_a_damaged_gzip_file_is_refused(tmp_path, content):
    (tmp_path / "data.csv.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.csv\.gz:.* (found|cannot be read)"):
        main([str(tmp_path / "data.csv.gz"), str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("name", "line"), [("data.jsonl", '{"query": "q2", "pos'), ("data.jsonl", "7"), ("data.tsv", "q2\tp2\tn2\tmore")]
)
def test_lines_that_are_not_rows_can_be_skipped(tmp_path, name, line):
    good = ["query\tpositive\tnegative", "q\tp\tn", "q3\tp3\tn3"]
    if name.endswith("jsonl"):
        good = ["", '{"query": "q", "pos": ["p"]}', '{"query": "q3", "pos": ["p3"]}']
    path = write(tmp_path / name, "\n".join([*good[:2], line, good[2]]).lstrip("\n") + "\n")
    with pytest.raises(UserError, match="--skip_bad"):
        main([str(path), str(tmp_path / "out")])
    main([str(path), str(tmp_path / "out"), "--skip_bad"])
    assert len(rows_of(tmp_path / "out")) == 2
    assert f"{name}:{2 if name.endswith('jsonl') else 3}: " in (tmp_path / "out" / "skipped.txt").read_text()


def test_a_hub_that_cannot_be_reached_gives_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hub:nobody/nothing: cannot be read: ") as error:
        main(["hub:nobody/nothing", str(tmp_path / "out")])
    assert "\n" not in str(error.value)


def test_a_hub_data_set_is_read_like_a_file(tmp_path):
    """The library reads a local folder as it reads a repository of the hub."""
    (tmp_path / "repo").mkdir()
    write(tmp_path / "repo" / "train.jsonl", "".join(json.dumps(pair) + "\n" for pair in PAIRS))
    main([f"hub:{tmp_path / 'repo'}", str(tmp_path / "out")])
    assert len(rows_of(tmp_path / "out", "repo")) == 6


def test_every_query_of_scifact_is_either_trained_or_held_out(shared_data, tmp_path):
    source = shared_data / "beir" / "scifact"
    main([str(source), str(tmp_path / "out"), "--held_out", "100"])
    (records,) = load_records(tmp_path / "out" / "train", tmp_path / "cache")
    train = {records[i].query.text for i in range(len(records))}
    lines = (tmp_path / "out" / "held_out" / "queries.jsonl").read_text().splitlines()
    held_out = {json.loads(line)["text"] for line in lines}
    texts = {row["_id"]: row["text"] for row in map(json.loads, (source / "queries.jsonl").read_text().splitlines())}
    qrels = [line.split("\t") for line in (source / "qrels" / "train.tsv").read_text().splitlines()[1:]]
    assert train | held_out == {texts[query] for query, _, score in qrels if float(score) > 0}
    assert not train & held_out and 90 <= len(held_out) <= 100


# ---- scored pairs

STS = "sentence1,sentence2,score\na,b,3.5\na,c,0\nd,e,5\na,b,3.5\na,b,2\n"


def test_scored_pairs_keep_their_score(tmp_path, capsys):
    with pytest.raises(UserError, match=r"say --label_column score .*, --score_column score to train on the numbers"):
        main([str(write(tmp_path / "data.csv", STS)), str(tmp_path / "out")])
    main([str(tmp_path / "data.csv"), str(tmp_path / "out"), "--score_column", "Score"])
    pairs = [(row["query"], *row["pos"], row["score"]) for row in rows_of(tmp_path / "out")]
    assert pairs == [("a", "b", 3.5), ("a", "c", 0.0), ("d", "e", 5.0), ("a", "b", 2.0)], "one exact repeat is left out"
    (records,) = load_records(tmp_path / "out" / "train", tmp_path / "cache")
    assert records.scored_rows == (4, 4) and not records.score_errors
    shown = capsys.readouterr().out
    assert "score <- score" in shown and "- scores: 0 to 5; " in shown and "with --contrastive_weight 0" in shown
    main([str(tmp_path / "data.csv"), str(tmp_path / "label"), "--label_column", "score", "--positive_above", "3"])
    assert not any("score" in row for row in rows_of(tmp_path / "label")), "control: as a label it becomes none"


def test_a_score_column_with_the_name_of_scores_of_passages_is_the_score_of_the_pair(tmp_path):
    path = write(tmp_path / "data.csv", STS.replace("score", "pos_score"))
    main([str(path), str(tmp_path / "out"), "--score_column", "pos_score"])
    assert [row["score"] for row in rows_of(tmp_path / "out")] == [3.5, 0.0, 5.0, 2.0]
    main([str(path), str(tmp_path / "none"), "--ignore_columns", "pos_score"])
    assert not any({"score", "pos_scores"} & row.keys() for row in rows_of(tmp_path / "none"))
    main([str(path), str(tmp_path / "side")])
    assert all("pos_scores" in row for row in rows_of(tmp_path / "side")), "control"


@pytest.mark.parametrize(
    ("text", "flags", "found"),
    [
        (STS + "f,g,\n", "", "data.csv:7: score: found '', wanted a number"),
        (STS + "f,g,nan\n", "", "data.csv:7: score: found 'nan', wanted a number"),
        (STS + 'f,g,"3,5"\n', "", "score: found '3,5', wanted a number"),
        (STS.replace("score", "like"), "", "wanted a column 'score' (--score_column)"),
        ("sentence1,sentence2,negative,score\na,b,c,1\n", "", "score: found 1 positives and 1 negatives, wanted one"),
        ("sentence1,sentence2,score\na,b,1\nc,d,1\n", "", "--score_column score: found 1 in all rows, wanted two"),
        (STS, "--held_out 1", "--score_column with --held_out: "),
        (STS, "--label_column score", "--score_column with --label_column: "),
    ],
)
def test_scores_that_cannot_be_trained_on_are_refused(tmp_path, text, flags, found):
    path = write(tmp_path / "data.csv", text)
    with pytest.raises(UserError, match=re.escape(found)):
        main([str(path), str(tmp_path / "out"), "--score_column", "score", *flags.split()])
    assert not (tmp_path / "out").exists()
    if text.startswith(STS + "f"):
        main([str(path), str(tmp_path / "out"), "--score_column", "score", "--skip_bad"])
        assert len(rows_of(tmp_path / "out")) == 4
