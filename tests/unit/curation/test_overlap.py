"""Texts of evaluation sets are found in training data: exact copies, near copies, and no others."""

import gzip
import json
import random

import numpy as np
import pytest

from gritlm.curation import near_copies
from gritlm.curation.near_copies import Match, NearCopies, is_near_copy
from gritlm.curation.overlap import EvaluationTexts, Leak
from gritlm.data.rows import parse_row
from gritlm.errors import UserError

LONG = "the keeper of the old lighthouse counts every ship that passes the northern reef before the winter storms"
CHINESE = "请问冬天从六号码头到灯塔的渡轮每天几点开船票价是多少钱呢"
JAPANESE = "冬の間に六番埠頭から灯台まで行くフェリーは毎日何時に出発しますか"
THAI = "เรือข้ามฟากจากท่าเรือหมายเลขหกไปยังประภาคารในฤดูหนาวออกเดินทางกี่โมง"


@pytest.mark.parametrize(
    ("text", "copy"),
    [
        ("how tall is it", "How  tall is\u00a0it?!"),
        ("the self-driving car's U.S. price is 1,000", "The selfdriving cars US price is 1000."),
        ("data base", "database"),
        ("full width", "ｆｕｌｌ　ｗｉｄｔｈ"),
        ("किताब कहाँ है", "किताब कहाँ है?"),
        ("soft hyphen", "soft hy\u00adphen"),
        ("python", "query: python"),
        ("tides", "Instruct: Given a question, retrieve passages that answer it\nQuery: tides"),
        ("tides", "Represent this sentence for searching relevant passages: tides"),
        ("who bakes bread", "Please find what answers this: who bakes bread"),
        ("query: who bakes bread", "search_query: who bakes bread"),
        (LONG, "I would like to know whether it is true that " + LONG.upper()),
        (LONG, LONG.replace("passes", "leaves")),
        (LONG, LONG.replace("northern ", "")),
        (LONG, LONG.replace("northern", "far northern")),
        (LONG, LONG.replace("lighthouse", "lighthose").replace("winter", "wintr")),
        ("the misspelt lighthouse keeper counts ships", "the misspelt lighthouse keper counts ships"),
        *((text, text[:7] + "々" + text[8:]) for text in (CHINESE, JAPANESE, THAI)),
        ("who's at R&D in H2O", "<p>Who&#39;s at R&amp;amp;D in H<sub>2</sub>O?</p>"),
        (CHINESE, "".join(f"{letter} " for letter in CHINESE) + "？"),
    ],
)
def test_a_near_copy_is_found(text, copy):
    index = NearCopies(["something else", text, "who sells bread here"])
    assert index.find(copy) == Match("near", 1)
    assert index.find(text + " \n") == Match("exact", 1)
    assert is_near_copy(text, copy) and is_near_copy(copy, text)


@pytest.mark.parametrize(
    ("text", "other", "kind"),
    [
        ("how to sort a list in C++", "how to sort a list in C#", "similar"),
        ("how to sort a list", "how to sort a dictionary", ""),
        ("who bakes bread", "who sells bread", ""),
        ("???", "!!!", ""),
        ("a vector<int>", "a vector<float>", ""),
        ("a List<A>", "a List<B>", ""),
        ("कितब कह है", "किताब कहाँ है", ""),  # without the vowel signs other words
        ("asthma: what are the symptoms", "diabetes: what are the symptoms", ""),
        ("what is type 1 diabetes mellitus in children", "what is type 2 diabetes mellitus in children", "similar"),
        (LONG, LONG.replace("old", "new").replace("northern", "southern"), "similar"),
        (LONG, " ".join(reversed(LONG.split())), ""),
        (LONG, LONG + " begin to blow and the harbour fills with the boats of the village", ""),
        (CHINESE, CHINESE[:4] + "夏夏" + CHINESE[6:12] + "桥山" + CHINESE[14:], "similar"),
        (CHINESE, CHINESE[::-1], ""),
    ],
)
def test_another_text_is_no_near_copy(text, other, kind):
    assert NearCopies([text]).find(other).kind == kind
    assert not is_near_copy(text, other)


def _sentences(seed: int, count: int, low: int, high: int) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(3, 9))) for _ in range(400)]
    return [" ".join(draw.choices(words, k=draw.randint(low, high))) for _ in range(count)]


@pytest.mark.parametrize(("low", "high"), [(12, 47), (48, 300)])
def test_no_copy_with_one_word_in_12_changed_is_missed(low, high, monkeypatch):
    texts, draw = _sentences(0, 300, low, high), random.Random(1)
    copies = []
    for text in texts:
        words = text.split()
        for start in range(0, len(words) - near_copies.NEAR + 1, near_copies.NEAR):
            place = start + draw.randrange(near_copies.NEAR)
            words[place] = draw.choice(["changed", "", words[place] + " added"])
        copies.append(" ".join(words))
    matches = NearCopies(texts).find_all(copies)
    assert [match.number for match in matches] == [*range(300)]
    expected = [near_copies._compare(*map(near_copies._words, pair)) for pair in zip(texts, copies, strict=True)]
    assert [match.kind for match in matches] == expected and expected.count("near") > 250
    assert {match.kind for match in NearCopies(_sentences(2, 300, low, high)).find_all(copies)} == {""}
    monkeypatch.setattr(near_copies, "GRAMS", {9: ((low, high), (low, high))})
    longer = NearCopies(texts).find_all(copies)
    assert Match() in longer, "control: longer n-grams miss copies"


def test_many_texts_at_once_are_found_as_one_by_one_and_the_index_is_the_same_in_each_process():
    texts = [*_sentences(0, 50, 1, 60), "", "...", "a\x00b", "x" * 2000, LONG, CHINESE]
    index = NearCopies(texts)
    looked_up = [*texts, *(text.upper() for text in texts), *_sentences(3, 20, 1, 60)]
    assert index.find_all(looked_up) == [index.find(text) for text in looked_up]
    assert index.find_all([]) == [] and NearCopies([]).find(LONG) == Match()
    assert NearCopies([LONG])._grams.sum() == np.uint64(11224833703098187776), (
        "the seed of hash() differs in each process"
    )


# ---- evaluation sets


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    queries = [
        {"_id": "a b", "text": "the query of the test split"},
        {"_id": "a", "text": "a query of the train split"},
    ]
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    corpus = [{"_id": "d", "title": "Harbour", "text": LONG}, {"_id": "e", "title": "", "text": "not relevant"}]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in corpus))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\na b\td\t1\na b\te\t0\n")
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\na\te\t1\n")
    return folder


def _leaks(path, *rows):
    rows = [
        parse_row({"query": query, "pos": positives, "neg": ["Not relevant."]}, "x:1") for query, *positives in rows
    ]
    return [*EvaluationTexts.read([path]).find_leaks(rows)]


ROWS = (
    ("The query of the test split?", "x", "the query of the test split"),
    ("a query of the train split", "Not relevant."),
    ("another", LONG, "Harbour. " + LONG),
    ("and another", "harbour " + LONG.replace("old", "new")),
)


def test_queries_are_compared_with_queries_and_relevant_documents_with_positives(beir):
    found = [
        Leak(0, "query", "near"),
        Leak(0, "query as positive", "exact"),
        Leak(2, "document", "exact"),
        Leak(3, "document", "near"),
    ]
    assert _leaks(beir, *ROWS) == found
    assert _leaks(beir / "qrels" / "train.tsv", *ROWS) == [Leak(1, "query", "exact"), Leak(1, "document", "near")]
    assert EvaluationTexts.read([beir]).read_from == [
        f"{beir}: 1 queries, 2 texts of relevant documents; split test (not read: train)"
    ]
    (beir / "qrels" / "test.tsv").rename(beir / "qrels" / "zs_test.tsv")
    assert _leaks(beir, *ROWS) == found, "train is not read beside another split"
    (beir / "qrels" / "zs_test.tsv").rename(beir / "qrels" / "test.tsv")
    (beir / "corpus.jsonl").unlink()
    assert _leaks(beir, *ROWS) == found[:2], "queries and qrels are enough for the queries"
    (beir / "qrels" / "test.tsv").write_text("another d 1\n")
    with pytest.raises(UserError, match=r"test\.tsv: found no id of .*queries\.jsonl in it"):
        _leaks(beir, *ROWS)
    with pytest.raises(UserError, match="found no queries and qrels in it"):
        _leaks(beir / "qrels", *ROWS)


@pytest.mark.parametrize(
    ("name", "content", "leaks"),
    [
        ("a.jsonl", '{"query": "who bakes it", "text": "Olsen bakes it."}', ["query", "document"]),
        ("a.jsonl", '{"_id": "1", "title": "", "text": "who bakes it"}', ["query"]),
        (
            "a.jsonl",
            '{"Query": ["Instruct: x\\nQuery: ", "who bakes it"], "pos": ["Olsen bakes it."]}',
            ["query", "document"],
        ),
        ("a.jsonl", '"who bakes it"\n["Instruct: ", "another"]', ["query"]),
        ("a.jsonl", '{"sentence1": "x", "sentence2": "who bakes it", "score": 3}', ["query"]),
        ("a.jsonl", '{"question": "who bakes it", "answer": "Olsen bakes it."}', ["query", "document"]),
        (
            "a.jsonl",
            '{"question": "who bakes it", "text": "x", "positive_1": "Olsen bakes it."}',
            ["query", "document"],
        ),
        ("a.jsonl", '{"question": "who bakes it", "answers": {"text": ["Olsen bakes it."]}}', ["query", "document"]),
        ("a.jsonl", '{"question": "who bakes it", "relevant": 1, "text": "Olsen bakes it."}', ["query", "document"]),
        ("a.json", '["another", "who bakes it"]', ["query"]),
        ("a.jsonl", '["who bakes it", "Olsen bakes it."]\n["x", "y"]', ["query", "document"]),
        ("a.csv", 'question,passage\nwho bakes it,"Olsen bakes it."', ["query", "document"]),
        ("a.json", '[{"question": "who bakes it"}]', ["query"]),
        (
            "a.jsonl.gz",
            '{"anchor": "who bakes it", "positive": {"title": "", "text": "Olsen bakes it."}}',
            ["query", "document"],
        ),
    ],
)
def test_files_of_queries_are_read_in_any_usual_form(tmp_path, name, content, leaks):
    data = (content + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [leak.what for leak in _leaks(tmp_path / name, ("who bakes it", "Olsen bakes it."))] == leaks


@pytest.mark.parametrize(
    "content", ['{"label": 3}', "3", '{"query": {"x": 1}}', '{"text": "\\ud800"}', '{"query": ["a", "b", "c"]}']
)
def test_a_row_without_a_query_is_named(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(f'{{"query": "x"}}\n{content}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: "):
        EvaluationTexts.read([tmp_path / "a.jsonl"])
