"""BEIR folders in the forms that people have them: what is read, what is counted, what is refused."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gritlm.data.beir import find_beir, read_beir
from gritlm.data.containers import FileError
from gritlm.data.raw import BadRows
from gritlm.errors import UserError

CORPUS = [{"_id": "d1", "title": "Rain", "text": "Water."}, {"_id": "d2", "title": "", "text": "Ice."}]
QUERIES = [{"_id": "q1", "text": "what is rain"}, {"_id": "q2", "text": "what is snow"}]
QRELS = "query-id\tcorpus-id\tscore\nq2\td2\t2\nq1\td1\t1\nq1\td2\t0\n"
WANTED = [("what is snow", ["Ice."]), ("what is rain", ["Rain Water."])]


def lines(rows):
    return "\n".join(map(json.dumps, rows))


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(content), folder / name)
        else:
            content = content if isinstance(content, str) else lines(content)
            data = content.encode(errors="surrogateescape")
            (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


def beir(folder, qrels=QRELS, corpus=CORPUS, queries=QUERIES):
    return write(folder, {"qrels/train.tsv": qrels, "corpus.jsonl": corpus, "queries.jsonl": queries})


def read(folder, bad=None, split=None, notes=None):
    found = find_beir(folder)
    assert found is not None
    examples = read_beir(found, split, bad or BadRows(), Counter() if notes is None else notes)
    return [(example.query, example.positives) for example in examples]


@pytest.mark.parametrize(
    "qrels",
    {
        "BEIR": QRELS,
        "no header": QRELS.split("\n", 1)[1],
        "another header": QRELS.replace("query-id\tcorpus-id\tscore", "query_id\tdoc_id\trelevance"),
        "unknown names": QRELS.replace("query-id\tcorpus-id\tscore", "eine\tandere\tsprache"),
        "a byte order mark": "\ufeffq2\td2\t1\nq1\td1\t1\n",
        "TREC": "q2 Q0 d2 1\nq1 Q0 d1 1\n",
        "TREC with tabs": "q2\t0\td2\t1\r\nq1\t0\td1\t1\r\n",
        "TREC with a header": "topic\titer\tdocno\trel\nq2\t0\td2\t1\nq1\t0\td1\t1\n",
        "another order": "score\tcorpus-id\tquery-id\n1\td2\tq2\n1\td1\tq1\n",
        "no score": "query-id\tcorpus-id\nq2\td2\nq1\td1\n",
        "commas": QRELS.replace("\t", ","),
        "repeated": QRELS + "q1\td1\t1\n",
        "an unusual score": QRELS.replace("score", "usefulness"),
        "an unusual score in TREC": "qid\titeration\tdocid\tworth\nq2\t0\td2\t1\nq1\t0\td1\t1\nq1\t0\td2\t0\n",
        "a column of this split": "qid\tpid\tgain\tsplit\nq2\td2\t1\ttrain\nq1\td1\t1\tTrain\n",
    }.items(),
    ids=lambda item: item[0],
)
def test_qrels(tmp_path, qrels):
    notes = Counter()
    assert read(beir(tmp_path, qrels[1]), notes=notes) == WANTED
    assert notes["repeated judgements, left out"] == (qrels[0] == "repeated")


FORMS = {
    "gzipped": {"corpus.jsonl.gz": CORPUS, "queries.jsonl.gz": QUERIES, "qrels/train.tsv.gz": QRELS},
    "one folder down": {"set/corpus.jsonl": CORPUS, "set/queries.jsonl": QUERIES, "set/qrels/train.tsv": QRELS},
    "id for _id": {
        "corpus.jsonl": [{"id": row["_id"], "title": row["title"], "text": row["text"]} for row in CORPUS],
        "queries.jsonl": [{"qid": row["_id"], "text": row["text"]} for row in QUERIES],
        "qrels/train.tsv": QRELS,
    },
    "MTEB": {
        "corpus/corpus-00000-of-00002.parquet": CORPUS[:1],
        "corpus/corpus-00001-of-00002.parquet": CORPUS[1:],
        "queries/queries-00000-of-00001.parquet": QUERIES,
        "data/train-00000-of-00001.parquet": [
            {"query-id": "q2", "corpus-id": "d2", "score": 1},
            {"query-id": "q1", "corpus-id": "d1", "score": 1},
        ],
        "README.md": "# MTEB",
    },
    "NanoBEIR": {
        "corpus/train-00000-of-00001.parquet": CORPUS,
        "queries/train-00000-of-00001.parquet": QUERIES,
        "qrels/train-00000-of-00001.parquet": [
            {"query-id": "q2", "corpus-id": "d2"},
            {"query-id": "q1", "corpus-id": "d1"},
        ],
    },
    "JSON lines": {
        "corpus.jsonl": CORPUS,
        "queries.jsonl": QUERIES,
        "qrels/train.jsonl": [
            {"query-id": "q2", "corpus-id": "d2", "score": 1},
            {"query-id": "q1", "corpus-id": "d1", "score": 1},
        ],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_folder(tmp_path, form):
    assert read(write(tmp_path, FORMS[form])) == WANTED


def test_what_is_left_out_is_counted(tmp_path):
    corpus = [*CORPUS, {"_id": "d3", "text": " "}, {"_id": "d4", "title": None, "text": None}]
    qrels, notes = QRELS + "q1\td3\t1\nq3\td4\t1\nq4\td1\t0\nq5\td1\t1\n", Counter()
    queries = [
        *QUERIES,
        {"_id": "q3", "text": "blank?"},
        {"_id": "q4", "text": "no text"},
        {"_id": "q5", "text": " "},
    ]
    assert read(beir(tmp_path, qrels, corpus, queries), notes=notes) == WANTED
    assert +notes == {
        "blank passages of the corpus, left out": 2,
        "blank queries, left out": 1,
        "queries without a passage of a score above 0, left out": 2,
    }


def test_words_of_empty_cells_in_a_corpus_are_no_texts(tmp_path):
    corpus = [
        *({"_id": "d1", "title": "Rain", "text": "Water."}, {"_id": "d2", "title": "nan", "text": "Ice."}),
        {"_id": "d3", "title": "Nan", "text": "NULL"},
    ]
    notes = Counter()
    assert read(beir(tmp_path, QRELS + "q1\td3\t1\n", corpus), notes=notes) == WANTED
    assert notes["titles left out: words of empty cells (nan, NULL, ...)"] == 2
    assert notes["blank passages of the corpus, left out"] == 1
    corpus[1]["title"] = "Nancy"
    assert read(beir(tmp_path, QRELS, corpus))[0] == ("what is snow", ["Nancy Ice."]), "control"


ONE_ROW = {  # a fault of one row: message, and what is left with --skip_bad
    "another grade": ({"qrels": QRELS + "q1\td1\t2\n"}, r"train\.tsv:5: found another score for query 'q1'", 2),
    "an unknown passage": (
        {"qrels": QRELS + "q1\td9\t1\n"},
        r"train\.tsv:5: found the id 'd9', wanted one of .*corpus",
        2,
    ),
    "an unknown query": (
        {"qrels": QRELS + "q9\td1\t0\n"},
        r"train\.tsv:5: found the id 'q9', wanted one of .*queries",
        2,
    ),
    "a score in words": (
        {"qrels": QRELS + "q1\td1\thigh\n"},
        r"train\.tsv:5: found 'q1\\td1\\thigh', wanted query-id",
        2,
    ),
    "a score of NaN": ({"qrels": QRELS + "q1\td1\tnan\n"}, r"train\.tsv:5: found 'q1\\td1\\tnan'", 2),
    "two columns": ({"qrels": QRELS + "q1\td1\n"}, r"train\.tsv:5: found 'q1\\td1'", 2),
    "an id twice": ({"corpus": [*CORPUS, CORPUS[0]]}, r"corpus\.jsonl:3: found the _id 'd1' a second time", 2),
    "a list of texts": (
        {"corpus": [{"_id": "d1", "title": "Rain", "text": ["Water", "falls"]}, CORPUS[1]]},
        r"corpus\.jsonl:1: text: found list, wanted a string",
        1,
    ),
    "no id": ({"corpus": [*CORPUS, {"text": "x"}]}, r"corpus\.jsonl:3: found the keys text, wanted _id and text", 2),
    "half a surrogate": (
        {"queries": [*QUERIES, {"_id": "q\ud800", "text": "\ud800"}]},
        r"queries\.jsonl:3: text: found",
        2,
    ),
}


@pytest.mark.parametrize("case", ONE_ROW)
def test_a_bad_row(tmp_path, case):
    parts, message, left = ONE_ROW[case]
    folder = beir(tmp_path, **parts)
    with pytest.raises(UserError, match=message + ".*HINT"):
        read(folder, BadRows(hint=" HINT"))
    bad = BadRows(skip=True)
    assert len(read(folder, bad)) == left and bad.messages


WHOLE = {
    "no score for certain": (
        {"qrels/train.tsv": "qid\tpid\ta\tb\nq1\td1\t0\t1\n"},
        r"train\.tsv:2: found the columns qid, pid, a, b; wanted one that is the relevance \(score, ",
    ),
    "two scores": (
        {"qrels/train.tsv": "qid\tpid\tgrade\tscore\nq1\td1\t0\t1\n"},
        r"train\.tsv:2: found the columns qid, pid, grade, score; wanted one that is the relevance",
    ),
    "a score in words of an unusual name": (
        {"qrels/train.tsv": "qid\tpid\tworth\nq1\td1\thigh\n"},
        r"train\.tsv:2: found the columns qid, pid, worth; wanted one that is the relevance",
    ),
    "rows of another split": (
        {"qrels/train.tsv": "qid\tpid\tscore\tsplit\nq1\td1\t1\ttrain\nq2\td2\t1\ttest\n"},
        r"train\.tsv:3: found 'test' in the column split, wanted train in each row of this file",
    ),
    "a run": (
        {"qrels/train.tsv": "q1 Q0 d1 1 0.5 run\n"},
        r"train\.tsv:1: found 'q1 Q0 d1 1 0.5 run', wanted query-id",
    ),
    "no passage known": ({"qrels/train.tsv": "q1\tx\t1\n"}, r"train\.tsv: found none of its ids in .*corpus\.jsonl"),
    "not UTF-8": ({"qrels/train.tsv": "q0\td\udcff\t1\n"}, r"train\.tsv: found .* wanted tab-separated UTF-8 text"),
    "no such split": (
        {"qrels/dev.tsv": QRELS},
        r"qrels/test.tsv: no such file; found the splits dev, train \(--split\)",
    ),
    "two corpora": ({"corpus.jsonl.gz": CORPUS}, r"found corpus\.jsonl and corpus\.jsonl\.gz, wanted corpus\.jsonl"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_fault_of_the_whole_folder_is_not_skipped(tmp_path, case):
    files, message = WHOLE[case]
    with pytest.raises(FileError, match=message):
        read(write(beir(tmp_path), files), BadRows(skip=True), split="test" if case == "no such split" else None)


def test_several_folders_are_named_and_none_is_none(tmp_path):
    assert find_beir(tmp_path) is None
    beir(tmp_path / "a")
    assert find_beir(tmp_path).path == tmp_path / "a", "control: one is read"
    beir(tmp_path / "b")
    with pytest.raises(FileError, match="found the BEIR folders a, b, wanted one of them"):
        find_beir(tmp_path)
    (tmp_path / "b" / "queries.jsonl").unlink()
    with pytest.raises(FileError, match=r"found no queries\.jsonl, wanted corpus\.jsonl"):
        find_beir(tmp_path / "b")


def test_an_instruction_of_a_query_is_that_of_its_example(tmp_path):
    queries = [QUERIES[0] | {"instruction": "Find rain"}, QUERIES[1]]
    found = find_beir(beir(tmp_path, queries=queries))
    assert found is not None
    examples = read_beir(found, None, BadRows(), Counter())
    assert {e.query: e.instruction for e in examples} == {"what is rain": "Find rain", "what is snow": None}


def test_many_judgements_in_any_order(tmp_path):
    """Against a dictionary: a judgement per line, queries in the order of their first positive."""
    corpus = [{"_id": str(i), "text": f"text {i}\nline"} for i in range(300)]
    queries = [{"_id": str(i), "text": f"query {i}"} for i in range(50)]
    judged = [(i * 7 % 50, i * i % 300, i % 3) for i in range(200)]
    wanted: dict[int, list[str]] = {}
    first = {(query, passage): grade for query, passage, grade in reversed(judged)}
    for query, passage in dict.fromkeys((query, passage) for query, passage, _ in judged):
        if first[query, passage]:
            wanted.setdefault(query, []).append(f"text {passage}\nline")
    qrels = "\n".join(f"{query}\t{passage}\t{grade}" for query, passage, grade in judged)
    found = read(beir(tmp_path, qrels, corpus, queries), BadRows(skip=True))
    assert found == [(f"query {query}", passages) for query, passages in wanted.items()]
