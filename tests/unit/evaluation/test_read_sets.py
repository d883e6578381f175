"""Evaluation sets from folders and files: their kinds and forms, and what is refused in one line."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gritlm.errors import UserError
from gritlm.evaluation.read_sets import read_sets
from gritlm.evaluation.sets import ClassificationSet, RetrievalSet, StsSet, own_passages

QUERIES = [{"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"}, {"_id": "q3", "text": "not judged"}]
CORPUS = [
    {"_id": "d1", "title": "A", "text": "a"},
    {"_id": "d10", "title": "", "text": "b"},
    {"_id": "d9", "text": "c"},
]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td9\t0\nq2\td10\t1\n"
ROW = {"query": ["Instruct: find\nQuery: ", "one"], "pos": ["a"], "neg": ["b"]}
STS = [{"sentence1": "a", "sentence2": "b", "score": 0.5}, {"sentence1": "c", "sentence2": "d", "score": 4}]
LABELS = [{"text": f"text {number}", "label": number % 2} for number in range(8)]


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
        return path
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def beir(folder: Path, gz: str = "", **parts) -> Path:
    """A BEIR folder; a part that is None is left out."""
    for name, content in ({"queries": QUERIES, "corpus": CORPUS, "test": QRELS} | parts).items():
        inner = f"{name}.jsonl{gz}" if name in ("queries", "corpus") else f"qrels/{name}.tsv{gz}"
        if content is not None:
            write(folder / inner, content)
    return folder


def read(*paths: Path):
    return read_sets([str(path) for path in paths])


HEADERS = {
    "of another name": QRELS.replace("query-id\tcorpus-id\tscore", "qid\tpid\trelevance"),
    "none": QRELS.split("\n", 1)[1],
    "TREC": "q1 0 d1 2\nq1 0 d9 0\nq2 Q0 d10 1\n",
    "TREC with tabs": "q1\t0\td1\t2\nq1\t0\td9\t0\nq2\t0\td10\t1\n",
    "repeated": QRELS + "q2\td10\t1\n\n",
    "decimals": QRELS.replace("2\n", "2.0\n"),
    "a byte order mark": "\ufeff" + QRELS,
}


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("qrels", [QRELS, *HEADERS.values()], ids=["BEIR", *HEADERS])
def test_a_beir_folder(tmp_path, qrels, gz):
    (found,) = read(beir(tmp_path / "set", gz, test=qrels))
    assert isinstance(found, RetrievalSet) and found.name == "set"
    assert (found.queries, found.query_ids, found.instructions) == (["one", "two"], ["q1", "q2"], None)
    assert found.corpus_ids == ["d9", "d10", "d1"], "in the order of trec_eval's ties"
    assert found.corpus == ["c", "b", "A a"]
    assert found.grades == [{"d1": 2, "d9": 0}, {"d10": 1}]
    assert found.notes == ["passages in the corpus: 3, so recall@100 says nothing"]


def test_id_in_place_of__id(tmp_path):
    queries, corpus = ([{"id" if k == "_id" else k: v for k, v in row.items()} for row in r] for r in (QUERIES, CORPUS))
    (found,) = read(beir(tmp_path, queries=queries, corpus=[row | {"id": row["id"]} for row in corpus]))
    assert found.query_ids == ["q1", "q2"] and found.corpus_ids == ["d9", "d10", "d1"]


def test_what_is_odd_but_no_error_is_said(tmp_path):
    qrels = QRELS + "gone\td1\t1\nq1\tlost\t1\nq3\td1\t0\n"
    (found,) = read(beir(tmp_path, test=qrels, corpus=[*CORPUS, {"_id": "blank", "title": "", "text": " "}]))
    assert found.query_ids == ["q1", "q2", "q3"] and found.grades[0] == {"d1": 2, "d9": 0, "lost": 1}
    assert found.notes[:4] == [
        "queries of the qrels that the queries file lacks, left out: 1",
        "judged passages that the corpus lacks, counted as not found: 1",
        "queries without a relevant passage in the corpus, counted as 0: 1",
        "blank passages: 1",
    ]


def test_the_split_is_test_or_dev_or_the_only_one(tmp_path):
    other = QRELS.replace("q1\td1\t2\n", "").replace("q1\td9\t0\n", "")
    assert len(read(beir(tmp_path / "a", dev=other, train=other))[0].queries) == 2
    assert len(read(beir(tmp_path / "b", test=None, dev=other, train=QRELS))[0].queries) == 1
    assert len(read(beir(tmp_path / "c", test=None, train=other))[0].queries) == 1
    (found,) = read(tmp_path / "a" / "qrels" / "train.tsv")
    assert (found.name, found.query_ids) == ("a-train", ["q2"])


def test_a_folder_of_sets_and_their_names(tmp_path):
    beir(tmp_path / "x" / "same")
    beir(tmp_path / "y" / "same")
    write(tmp_path / "y" / "sts.csv", "sentence1,sentence2,score\na,b,1\nc,d,2\n")
    write(tmp_path / "rows.jsonl.gz", [ROW])
    write(tmp_path / "README.md", "left out")
    names = [found.name for found in read(tmp_path, tmp_path / "x" / "same")]
    assert names == ["rows", "x-same", "y-same", "sts"], "each once"
    assert [found.name for found in read(tmp_path / "x" / "same" / "qrels")] == ["same-test"]
    with pytest.raises(UserError, match="found two sets of one name"):
        write(tmp_path / "y" / "sts.jsonl", STS)
        read(tmp_path)


def test_a_folder_of_parquet_files(tmp_path):
    """The form of MTEB's and NanoBEIR's sets on the hub."""
    queries = [{"_id": "q1", "text": "one"}]
    judged = [{"query-id": "q1", "corpus-id": "d1"}, {"query-id": "q1", "corpus-id": "d2"}]
    for kind, rows in (("corpus", CORPUS), ("queries", queries), ("qrels", judged)):
        write(tmp_path / "set" / kind / "train-00000-of-00001.parquet", rows)
    (found,) = read(tmp_path / "set")
    assert found.queries == ["one"] and found.grades == [{"d1": 1, "d2": 1}] and len(found.corpus) == len(CORPUS)


def test_rows_for_training_are_a_retrieval_set(tmp_path):
    rows = [
        ROW,
        {"query": ["Instruct: find\nQuery: ", "one"], "pos": ["c", ["Title: ", "d"]], "neg": ["e"]},
        {"query": "one", "pos": ["two"], "neg": []},
        {"query": "two", "pos": ["a"], "neg": ["one"]},
    ]
    (found,) = read(write(tmp_path / "rows.jsonl", rows))
    assert found.queries == ["one", "one", "two"] and found.instructions == ["Instruct: find\nQuery: "] * 1 + ["", ""]
    assert sorted(found.corpus) == ["Title: d", "a", "b", "c", "e", "one", "two"]
    texts = dict(zip(found.corpus_ids, found.corpus, strict=True))
    relevant = [sorted(texts[key] for key in grades) for grades in found.grades]
    assert relevant == [["Title: d", "a", "c"], ["two"], ["a"]]
    assert len(set(found.query_ids)) == 3
    (left_out,) = own_passages(found).items()
    assert (found.queries[left_out[0]], found.corpus[left_out[1]]) == ("two", "two"), "the passage is the query"
    pairs = write(tmp_path / "pairs.tsv", "question\tanswer\tnegative_1\none\ta\tb\n")
    (found,) = read(pairs)
    assert (found.queries, sorted(found.corpus), found.instructions) == (["one"], ["a", "b"], None)


def test_of_pairs_with_a_split_those_of_test_are_read(tmp_path):
    rows = [{"query": f"q{n}", "positive": f"p{n}", "split": split} for n, split in enumerate(("train", "test"))]
    (found,) = read(write(tmp_path / "f.jsonl", rows))
    assert found.queries == ["q1"] and found.corpus == ["p1"]
    assert found.notes[0] == "rows left out whose split is not test but train: 1"
    (both,) = read(write(tmp_path / "g.jsonl", [{"query": r["query"], "positive": r["positive"]} for r in rows]))
    assert both.queries == ["q0", "q1"], "control"


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet", "csv", "tsv.gz"])
def test_sts_and_classification_files(tmp_path, ending):
    def table(rows: list[dict]):
        if ending.startswith(("jsonl", "parquet")):
            return rows
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        return "".join(("," if ending == "csv" else "\t").join(map(str, line)) + "\n" for line in lines)

    (sts,) = read(write(tmp_path / f"sts.{ending}", table(STS)))
    assert sts == StsSet("sts", ["a", "c"], ["b", "d"], [0.5, 4.0])
    (halves,) = read(write(tmp_path / f"labels.{ending}", table(LABELS)))
    assert isinstance(halves, ClassificationSet)
    assert Counter(halves.train_labels) == Counter(halves.test_labels) == {"0": 2, "1": 2}
    assert sorted(halves.train_texts + halves.test_texts) == [row["text"] for row in LABELS]
    assert read(tmp_path / f"labels.{ending}") == [halves], "the same halves each time"
    split = [row | {"split": ("train", "test", "train", "test", "train", "dev")[i % 6]} for i, row in enumerate(LABELS)]
    split[0]["label"] = 1
    (found,) = read(write(tmp_path / f"split.{ending}", table([*split, split[0] | {"split": "test"}])))
    assert found.train_texts == ["text 0", "text 2", "text 4", "text 6"]
    assert found.test_labels == ["1", "1", "1", "1"]
    assert found.notes == [
        "rows that are neither train nor test, left out: 1",
        "test texts that are train texts too: 1",
    ]


NO_FOLDER = {
    "a folder without qrels": ({"test": None}, r"set/qrels: found no .tsv file, wanted test.tsv or dev.tsv, or"),
    "several other splits": (
        {"test": None, "train": QRELS, "validation": QRELS},
        "set/qrels: found the splits train, validation, wanted test.tsv",
    ),
    "no queries": ({"queries": None}, "set: found no queries.jsonl, wanted corpus.jsonl, queries.jsonl and qrels/"),
    "no corpus": ({"corpus": None}, "set: found no corpus.jsonl, wanted"),
    "an empty corpus": ({"corpus": ""}, "corpus.jsonl: found no row, wanted at least one"),
    "no judgement": ({"test": "query-id\tcorpus-id\tscore\n"}, "test.tsv: found no judgement, wanted query-id"),
    "no query known": (
        {"test": "x\td1\t1\ny\td1\t1\n"},
        "test.tsv: found none of its 2 query ids in .*set/queries.jsonl, ",
    ),
    "no passage known": (
        {"test": "q1\tx\t1\n"},
        "test.tsv: found none of its 1 passage ids in .*set/corpus.jsonl, wanted",
    ),
    "nothing relevant": (
        {"test": "q1\td1\t0\nq1\tx\t1\n"},
        "test.tsv: found no score above 0 for a passage of the corpus",
    ),
    "a score in words": ({"test": QRELS + "q2\td1\thigh\n"}, r"test.tsv:5: found 'q2\\td1\\thigh', wanted query-id"),
    "it in line 1": ({"test": "q2\td1\thigh\n"}, r"test.tsv:1: found 'q2\\td1\\thigh', wanted query-id"),
    "a score of NaN": ({"test": QRELS + "q2\td1\tnan\n"}, r"test.tsv:5: found 'q2\\td1\\tnan', wanted query-id"),
    "half a score": ({"test": QRELS + "q2\td1\t0.5\n"}, "test.tsv:5: found the score 0.5, wanted a whole number"),
    "two columns": ({"test": "q1\td1\n"}, r"test.tsv:1: found 'q1\\td1', wanted query-id, corpus-id and score"),
    "two judgements": (
        {"test": QRELS + "q1\td1\t0\n"},
        "test.tsv:5: found the scores 2 and 0 for query 'q1' and passage 'd1', wanted one",
    ),
    "an id twice": ({"corpus": [*CORPUS, CORPUS[0]]}, "corpus.jsonl:4: found the _id 'd1' a second time, wanted"),
    "no id": ({"queries": [{"key": "q1", "text": "one"}]}, "queries.jsonl:1: found the keys key, text, wanted _id"),
    "no text": ({"queries": [{"_id": "q1", "query": "one"}]}, "queries.jsonl:1: found the keys"),
    "an empty query": ({"queries": [{"_id": "q1", "text": " "}]}, "queries.jsonl:1: found an empty query, wanted a"),
    "a passage that is a number": (
        {"corpus": [{"_id": "d1", "text": 3}]},
        "corpus.jsonl:1: text: found int, wanted a string",
    ),
}


@pytest.mark.parametrize("case", NO_FOLDER)
def test_a_bad_folder(tmp_path, case):
    parts, message = NO_FOLDER[case]
    with pytest.raises(UserError, match=message) as raised:
        read(beir(tmp_path / "set", **parts))
    assert "\n" not in str(raised.value)
    assert len(read(beir(tmp_path / "good"))) == 1, "control"


NO_FILE = {
    "other columns": (
        "f.jsonl",
        [{"input": "a", "output": "b"}],
        r"f.jsonl: found the columns input, output; wanted query and pos \(retrieval\), sentence1",
    ),
    "graded pairs": (
        "f.csv",
        "query,text,label\na,b,0\n",
        "f.csv: found the column label beside pairs, wanted graded pairs as a BEIR folder",
    ),
    "a corpus": ("corpus.jsonl", CORPUS, "corpus.jsonl: found the columns _id, title, text; wanted"),
    "an empty file": ("f.jsonl", "", "f.jsonl: found no row, wanted at least one"),
    "a header alone": ("f.csv", "text,label\n", "f.csv: found no row, wanted at least one"),
    "no JSON": ("f.jsonl", "text\n", "f.jsonl:1: found Expecting value at column 1, wanted one JSON object a line"),
    "strings": ("f.jsonl", '"a"\n', 'f.jsonl:1: found "a", wanted an object with named fields'),
    "another ending": ("f.txt", "text\n", "f.txt: found another ending, wanted one of .jsonl"),
    "one score": ("f.jsonl", [STS[0], STS[0] | {"sentence1": "x"}], "f.jsonl: found the score 0.5 in all 2 rows"),
    "a score in words": (
        "f.csv",
        "sentence1,sentence2,label\na,b,entailment\n",
        "f.csv:2: label: found 'entailment', wanted a number",
    ),
    "a score of NaN": ("f.tsv", "text1\ttext2\tscore\na\tb\tnan\n", "f.tsv:2: score: found 'nan', wanted a number"),
    "no score": (
        "f.jsonl",
        [STS[0], {"sentence1": "a", "sentence2": "b"}],
        "f.jsonl:2: score: found None, wanted a nu",
    ),
    "an empty text": ("f.jsonl", [STS[0], STS[1] | {"sentence2": ""}], "f.jsonl:2: sentence2: found '', wanted a text"),
    "a text that is a number": ("f.jsonl", [{"text": 1, "label": 2}], "f.jsonl:1: text: found '1', wanted a text"),
    "the word of an empty cell": (
        "f.jsonl",
        [{"text": "nan", "label": 2}],
        "f.jsonl:1: text: found 'nan', the word of",
    ),
    "an empty cell in a pair": (
        "f.csv",
        "sentence1,sentence2,score\na,NULL,1\n",
        "f.csv:2: sentence2: found 'NULL', the",
    ),
    "pairs of another split": (
        "f.jsonl",
        [{"query": "q", "positive": "p", "split": "train"}],
        "f.jsonl: found no row whose split is test; found train$",
    ),
    "pairs for which prepare has a flag": (
        "f.jsonl",
        [{"question": "q r", "context": "a text", "answer": "a"}],
        r"say --positive_column context \(a flag of gritlm prepare",
    ),
    "one label": ("f.jsonl", [{"text": f"{i}", "label": "x"} for i in range(4)], "f.jsonl: found the label 'x' in all"),
    "a rare label": (
        "f.jsonl",
        [*LABELS, {"text": "y", "label": "rare"}],
        "f.jsonl: found one row with the label 'rare', wanted at least two of each label",
    ),
    "no label": ("f.jsonl", [*LABELS, {"text": "y", "label": None}], "f.jsonl:9: label: found None, wanted a label"),
    "labels": (
        "f.jsonl",
        [{"text": "y", "label": ["a", "b"]}],
        r"f.jsonl:1: label: found \['a', 'b'\], wanted a label",
    ),
    "no test rows": (
        "f.jsonl",
        [row | {"split": "train"} for row in LABELS],
        "f.jsonl: split: found train, wanted train and test",
    ),
    "a label to test alone": (
        "f.jsonl",
        [row | {"split": ("train", "test")[i > 5], "label": i % 7} for i, row in enumerate(LABELS)],
        "f.jsonl: found the label '6' in test rows only, wanted it in train rows too",
    ),
    "a bad row": ("f.jsonl", [ROW, ROW | {"pos": []}], "f.jsonl:2: pos: found an empty list, wanted at least one"),
    "an empty folder": ("f/README.md", "", "f: found no evaluation set in it, wanted BEIR folders or files"),
}


@pytest.mark.parametrize("case", NO_FILE)
def test_a_bad_file(tmp_path, case):
    name, content, message = NO_FILE[case]
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as raised:
        read(path.parent if path.parent != tmp_path else path)
    assert "\n" not in str(raised.value)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="none: found no such file or folder, wanted an evaluation set"):
        read(tmp_path / "none")
