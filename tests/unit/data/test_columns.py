"""Columns are chosen by name over all rows; labels, splits, ids, empty cells and lists are never misread in silence."""

import re
from collections import Counter

import pytest

from gritlm.data.columns import examples_of
from gritlm.data.labels import is_label, is_split, normal, unread_notes
from gritlm.data.raw import BadRows, Columns, RawExample, Reading
from gritlm.errors import UserError

LABELLED = [
    {"query": "what is rain", "passage": "Water that falls.", "label": 1},
    {"query": "what is rain", "passage": "A loaf.", "label": 0},
    {"query": "what is snow", "passage": "A song.", "label": 0},
]


def read(*rows: object, skip: bool = False, **flags) -> tuple[list[RawExample], Reading, list[str]]:
    bad, reading = BadRows(skip), Reading()
    numbered = [(f"f:{number}", row) for number, row in enumerate(rows, start=1)]
    found = list(examples_of(numbered, "f", Columns(**flags), bad, reading))
    return found, reading, bad.messages


def texts(*rows: object, **flags) -> list[tuple]:
    return [(example.query, example.positives, example.negatives) for example in read(*rows, **flags)[0]]


def refusal(*rows: object, **flags) -> str:
    with pytest.raises(UserError) as error:
        read(*rows, **flags)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- choosing


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"Question": "q", "ANSWER": "p"}, "query <- Question, positive <- ANSWER"),
        ({"question": "q", "document": "p", "text": "x"}, "query <- question, positive <- document (also there: text)"),
        ({"anchor": "q", "query": "x", "pos": "p"}, "query <- query (also there: anchor), positive <- pos"),
        ({"query": "q", "positive": "p", "id": 3, "url": "u"}, "positive <- positive; not read: id, url"),
        ({"query": "q", "title": "t", "text": "p"}, "query <- query, positive <- text; not read: title"),
        ({"query": "q", "answer": "a", "positive_ctxs": ["p"]}, "positive <- positive_ctxs (also there: answer)"),
        ({"sentence1": "q", "sentence2": "p", "answer": "a"}, "positive <- sentence2 (also there: answer)"),
        ({"query": "q", "positive_1": "p", "positive_2": "r"}, "positive <- positive_1 + positive_2"),
        ({"query": "q", "answer": True, "passage": "p"}, "positive <- passage; not read: answer"),
        ({"query": "q", "positive": None, "text": "p"}, "positive <- text; not read: positive"),
        ({"query": "q", "pos": ["p"], "pos_scores": [0.5]}, "scores <- pos_scores"),
        ({"query": "q", "pos": "p", "instruction": "Find it"}, "instruction <- instruction"),
    ],
)  # fmt: skip
def test_what_became_of_each_column_is_said(row, line):
    assert line in read(row)[1].lines()[0]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "negative",
            "neg",
            "negatives",
            "Hard Negatives",
            "hard_negative",
            "hardNegative",
            "neg_1",
            "negative-12",
            "neg3",
        ),
        *("hard_negative_2", "rejected", "rejected_response", "negative_passages", "hard_negative_ctxs", "neg_doc"),
        *("hard_neg", "negative_responses", "distractors", "bm25_negatives", "downvoted_answer", "negative_documents"),
        *("bad_passages", "wrong_answers", "hn"),
    ],
)
def test_negatives_are_read_under_any_usual_name(name):
    assert texts({"query": "q", "positive": "p", name: ["n", None, ""]}) == [("q", ["p"], ["n"])]


@pytest.mark.parametrize("name", ["negation", "neg_scores", "negative_ids", "negotiation", "negativity", "hard"])
def test_control_other_names_are_no_negatives(name):
    assert texts({"query": "q", "positive": "p", name: [1]}, skip=True) in ([("q", ["p"], [])], [])


def test_two_columns_of_unlike_kinds_are_refused_until_one_is_named():
    for other, value in (("contexts", ["p"]), ("context", "p"), ("passages", ["p"]), ("document", "p")):
        message = refusal({"question": "q", other: value, "answer": "a"})
        assert re.search(
            rf"columns (answer and )?{other}( and answer)? could be the positive; say --positive_col", message
        )
        assert texts({"question": "q", other: value, "answer": "a"}, positive=other) == [("q", ["p"], [])]
    assert "columns pos and positive_passages could" in refusal({"query": "q", "pos": "p", "positive_passages": ["r"]})


def test_columns_are_chosen_over_all_rows():
    rows = [{"query": "q", "document": "page 3"}] * 3 + [{"query": "q", "document": "page 4", "positive": "p"}]
    assert refusal(*rows).startswith("f:1: found no column 'positive', wanted it for the positive (found query, docu")
    assert texts(*rows, skip=True) == [("q", ["p"], [])]
    assert texts(*rows, positive="document")[0] == ("q", ["page 3"], [])
    more = [{"query": "q", "positive": "p"}, {"query": "q", "positive": "p", "neg_1": "n"}]
    assert texts(*more) == [("q", ["p"], []), ("q", ["p"], ["n"])]


def test_a_column_that_comes_late_is_read_or_stops_the_reading(monkeypatch):
    monkeypatch.setattr("gritlm.data.columns.SURVEYED", 2)
    first = [{"query": "q", "document": "d", "neg": None}] * 3
    assert texts(*first, {"query": "q", "document": "d", "hard_negative": "n", "url": "u"})[-1] == ("q", ["d"], ["n"])
    for late, found in (
        ({"positive": "p"}, r"f:4: found \['positive'\] as the positives, and \['document'\] before; name the columns"),
        ({"score": 0}, r"f:4: the column score \(0\) seems to say which pairs are positive"),
        ({"prompt": "Find it"}, "f:4: found 'prompt' as the instruction, and None before"),
    ):
        assert re.match(found, refusal(*first, {"query": "q", "document": "d"} | late))
    assert len(texts(*first, {"query": "q", "document": "d", "score": 0}, skip=True, ignore=["*"])) == 4


def test_a_named_column_is_found_whatever_its_case_or_refused():
    row = {"My Query": "q", "my-answer": "p", "other": "n"}
    flags = {"query": "my_query", "positive": "My Answer", "negatives": ["OTHER"]}
    assert texts(row, **flags) == [("q", ["p"], ["n"])]
    assert "wanted a column 'none' (--positive_column)" in refusal(row, **flags | {"positive": "none"})
    assert "wanted a column 'x' (--ignore_columns)" in refusal({"query": "q", "pos": "p"}, ignore=["x"])
    assert "wanted a column 'x' (--label_column)" in refusal({"query": "q", "pos": "p"}, label="x")
    assert "need --label_column" in refusal({"query": "q", "pos": "p"}, positive_above=1)
    assert "(--no_header, if the first line is a row)" in refusal({"where is it": "By the mill.", "": ""})


# ---- labels and splits


@pytest.mark.parametrize(
    ("name", "values", "how"),
    [
        ("label", (1, 0), "(0, 1) seems to say which pairs are positive; say --label_column label (1 is a positive)"),
        ("Score", (4.5, 0.0), "(0.0, 4.5) seems .* --label_column Score --positive_above NUMBER or --positive_labels"),
        ("gold_label", ("neutral", "entailment"), "(entailment, neutral) seems .* gold_label --positive_labels WORD"),
        ("is_duplicate", (True, False), "(false, true) seems"),
        ("similarity_score", ("0.2", "0.9"), "(0.2, 0.9) seems"),
        ("labels", ([1, 0], [0, 1]), "(0, 1) seems"),
        ("relevance", (1, 1), "(1) seems"),
        ("nli", ("Neutral", "entailment"), "(Neutral, entailment) seems"),
        ("answered", ("yes", None), "(yes) seems"),
    ],
)  # fmt: skip
def test_a_label_that_is_not_read_stops_the_reading(name, values, how):
    rows = [{"query": "q", "positive": "p", name: value} for value in values]
    assert re.match(re.escape(f"f: the column {name} {how}").replace(r"\.\*", ".*"), refusal(*rows))
    assert len(texts(*rows, ignore=[name])) == 2
    assert read(*rows, ignore=[name])[1].unread == [name]


@pytest.mark.parametrize("name", ["split", "fold", "dataset_split", "subset", "part"])
def test_a_split_that_is_not_read_stops_the_reading(name):
    rows = [{"query": "q", "positive": "p", name: "train"}, {"query": "r", "positive": "s", name: "TEST"}]
    assert f"the column {name} (TEST, train) names splits; --split reads one" in refusal(*rows)
    assert texts(*rows, split="test") == [("r", ["s"], [])]
    assert read(*rows, split="train")[1].lines()[1] == f"1 rows left out whose {name} is not train but TEST"
    assert f"found no row whose {name} is dev; found TEST, train" in refusal(*rows, split="dev")
    assert "--split has no effect" in refusal({"query": "q", "positive": "p", "topic": "trains"}, split="dev")
    assert texts({"query": "q", "positive": "p", "topic": "trains"}), "control"


def test_what_a_label_calls_no_positive_becomes_a_negative_of_its_query():
    found, reading, _ = read(*LABELLED, label="label")
    assert [(e.query, e.positives, e.negatives) for e in found] == [
        ("what is rain", ["Water that falls."], ["A loaf."])
    ]
    assert reading.lines()[1:] == [
        "1 rows whose label is not a positive's became negatives of their query",
        "1 rows whose label is not a positive's left out, as no positive of their query is beside them",
    ]
    assert len(texts(*LABELLED, ignore=["label"])) == 3, "control: three positives"


@pytest.mark.parametrize(
    ("labels", "flags", "wanted"),
    [
        ((4.2, "3", 0), {"positive_above": 3}, (1, 2)),
        ((4.2, "3.1", 0), {"positive_above": 3}, (2, 1)),
        ((-0.1, -0.5, 1), {"positive_above": -0.2}, (2, 1)),
        (("True", "false", "1.0"), {}, (2, 1)),
        (("Entailment", "neutral", "-"), {"positive_labels": ["entailment"]}, (1, 1)),
        ((0, 1, 2), {"positive_labels": ["0"]}, (1, 2)),
        ((0, -1, 2), {"positive_labels": ["0"]}, (1, 1)),
    ],
)
def test_the_forms_of_a_label(labels, flags, wanted):
    rows = [{"query": "q", "text": f"t{number}", "score": label} for number, label in enumerate(labels)]
    ((_, positives, negatives),) = texts(*rows, label="score", **flags)
    assert (len(positives), len(negatives)) == wanted


def test_a_label_without_a_meaning_is_a_bad_row():
    good = {"query": "q", "text": "a", "label": 1}
    for label, found in ((3, "found 3, wanted 0 or 1"), ("yes", "wanted a number"), (None, "found None as the label")):
        rows = good, {"query": "q", "text": "b", "label": label}
        assert re.match(f"f:2: .*{found}", refusal(*rows, label="label"))
        assert texts(*rows, label="label", skip=True) == [("q", ["a"], [])]
    assert "found no row whose label is a positive's" in refusal(*LABELLED[1:], label="label")


def test_a_list_of_labels_belongs_to_the_texts_beside_it():
    row = {"query": "q", "response": ["a", "b", "c"], "label": [0, 1, 0], "neg": "n"}
    found, reading, _ = read(row, label="label")
    assert [(e.query, e.positives, e.negatives) for e in found] == [("q", ["b"], ["n", "a", "c"])]
    assert "2 texts whose label is not a positive's became negatives of their query" in reading.lines()
    assert "found 2 labels, wanted one for each of 3 of response" in refusal(row | {"label": [0, 1]}, label="label")


def test_names_of_labels_and_splits():
    for name in ("label", "Labels", "goldLabel", "is_duplicate", "similarity-score", "relevance", "lab", "isRelevant"):
        assert is_label(name), name
    for name in (
        "pos_scores",
        "neg_scores",
        "negative_scores",
        "labelling",
        "island",
        "scored_by",
        "title",
        "question_id",
    ):
        assert not is_label(name), name
    assert is_split("data_split") and not is_split("splitting") and normal("Hard-Neg_1") == "hard_neg1"
    keys = Counter({"prompt": 9, "label": 8, "scores": 3, "pos_scores": 2, "split": 1})
    assert unread_notes(keys) == (["prompt", "label", "scores", "pos_scores", "split"], ["label", "split"])


# ---- cells


@pytest.mark.parametrize(
    "word", ["nan", "NaN", "NULL", "null", "None", "N/A", "n/a", "NA", "<NA>", "#N/A", float("nan")]
)
def test_the_word_of_an_empty_cell_is_no_text(word):
    good = {"query": "q", "positive": "p", "negative": "n"}
    found, reading, _ = read(good, good | {"negative": word})
    assert (
        found[1].negatives == [] and reading.lines()[1] == "1 negatives left out: words of empty cells (nan, NULL, ...)"
    )
    for name in ("query", "positive"):
        assert re.match(
            rf"f:2: {name}: found .*, the word of an empty cell, wanted a text", refusal(good, good | {name: word})
        )
    assert "wanted a text" in refusal(good | {"positive": ["p", word]})
    for text in ("nano", "Nana", "none of these", "nulls"):
        assert texts(good | {"negative": text})[0][2] == [text], "control"


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [
        ("['a b', \"it's\"]", ["a b", "it's"]),
        ('["a", "b"]', ["a", "b"]),
        ('["line\\nbreak"]', ["line\nbreak"]),
        ("[['I: ', 'a'], ['I: ', 'b']]", [["I: ", "a"], ["I: ", "b"]]),
        ("[1] a note", ["[1] a note"]),
        ("[edit]", ["[edit]"]),
        ("['tis the season", ["['tis the season"]),
        ("[]", []),
        ("('a', 'b')", ["a", "b"]),
        ("[{'title': 'T', 'text': 'a'}, {'text': 'b'}]", ["T a", "b"]),
        ("{'text': 'a'}", ["a"]),
        ("('tis the season)", ["('tis the season)"]),
    ],
)
def test_a_list_written_as_text_is_decoded(cell, wanted):
    row = {"query": "q", "positive": "p", "negatives": cell}
    assert texts(row) == [("q", ["p"], wanted)]


@pytest.mark.parametrize("cell", ["['a' 'b']", "['a'\n 'b']", "['a', 'b']]", '["a", b]', "['a', nan]"])
def test_a_list_that_cannot_be_decoded_is_a_bad_row(cell):
    good = {"query": "q", "positive": "['a', 'b']"}
    assert refusal(good, good | {"positive": cell}).startswith("f:2: positive: found [")
    assert len(texts(good, good | {"positive": cell}, skip=True)) == 1


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("positive", ("4011", "77120"), "numbers (4011, 77120)"),
        ("positive", (4011, 77120), "numbers"),
        ("query", ("1", "2"), "numbers"),
        ("negative", ("1.5", "-3"), "numbers"),
        ("positive", ("0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f",) * 2, "ids"),
        ("positive", (["d17", "d3"], ["d9"]), "ids (d17, d3, d9)"),
        ("positive", ("MED-10", "MED-11"), "ids"),
        ("positive", ("462221#4", "11#0"), "ids"),
        ("positive", ("https://a.b/c", "http://d.e"), "links"),
        ("positive", ("clueweb09-en0000-01-00001", "clueweb12-en0003-01-00041"), "ids"),
        ("positive", (["PMC13900", "11250756"], ["11250747"]), "ids"),
        ("positive", ("Rain_(weather)", "The_Book"), "ids"),
        ("positive", ("B00IQ9ODVI", "B07FZ8S74R"), "ids"),
    ],
)
def test_ids_and_numbers_are_no_texts(name, values, found):
    rows = [{"query": "what is that", "positive": "It rains.", "negative": "A bus.", name: value} for value in values]
    message = refusal(*rows)
    assert message.startswith(f"f: the column {name} holds {found}") and "and no texts; name the column" in message
    assert len(texts(*rows, accept_numbers=True)) == 2


def test_control_short_texts_are_texts():
    assert texts({"query": "q1", "positive": "p1"}, {"query": "q2", "positive": "p2"})
    assert texts({"query": "how old is it", "positive": "42"}, {"query": "how old is she", "positive": "forty"})
    assert texts({"query": "which plane is it", "positive": "B52"}, {"query": "what car is it", "positive": "A4"})
    message = refusal({"query": "a b", "positive": "x"}, {"query": "a b", "positive": 7})
    assert message == "f:2: positive: found the number 7, wanted a text (--accept_numbers takes numbers as texts)"
    assert texts({"query": "a b", "positive": 7}, accept_numbers=True) == [("a b", ["7"], [])]
    by_name = {"query_text": "what is rain", "positive_doc_ids": ["dx"]}
    assert "holds ids (dx)" in refusal(by_name, query="query_text", positive="positive_doc_ids")


def test_passages_may_be_objects():
    objects = [
        {"title": "Rain", "text": "falls", "docid": "3"},
        {"title": "", "text": "drops"},
        {"page_content": "wet"},
    ]
    assert texts({"query": "q", "pos": objects}) == [("q", ["Rain falls", "drops", "wet"], [])]
    with_instruction = {"instruction": "A text: ", "text": "drops"}
    assert texts({"query": "q", "pos": [with_instruction]}) == [("q", [["A text: ", "drops"]], [])]
    graded = [{"text": "a", "score": 0.7}, {"text": "b", "score": 0.1}]
    assert "the passages in contexts have the field score, so not all" in refusal({"query": "q", "contexts": graded})
    assert texts({"query": "q", "positive_ctxs": graded}) == [("q", ["a", "b"], [])], "control: they are positives"
    assert refusal({"query": "q", "passages": graded}) == "f:1: passages.score: found 0.7, wanted 0 or 1"
    assert refusal({"query": "q", "pos": [{"docid": "3"}]}).startswith("f:1: pos: found an object with docid, wanted")


def test_rows_of_which_no_passage_is_flagged_are_counted():
    rows = [{"query": "q", "passages": {"is_selected": [flag, 0], "passage_text": ["a", "b"]}} for flag in (1, 0, 0)]
    found, reading, _ = read(*rows)
    assert [(e.positives, e.negatives) for e in found] == [(["a"], ["b"])]
    assert reading.lines()[1:] == ["2 rows left out without a passage that is flagged"]


# ---- the two meanings of a list


def test_a_flat_instruction_and_text_is_one_passage():
    rows = [{"query": ["Q; ", f"q{n}"], "pos": ["A place: ", f"p{n}"], "neg": ["A place:", f"n{n}"]} for n in range(4)]
    found, reading, _ = read(*rows)
    assert (found[0].query, found[0].positives, found[0].negatives) == (
        ["Q; ", "q0"], [["A place: ", "p0"]], [["A place: ", "n0"]],
    )  # fmt: skip
    assert "positive <- pos as [instruction, text], negative <- neg as [instruction, text]" in reading.lines()[0]
    assert reading.lines()[1:] == ["4 instructions that ended without white space got a space"]
    assert texts({"query": "q", "pos": ["one answer", "another"]}) == [("q", ["one answer", "another"], [])], "control"


def test_the_same_text_first_in_every_list_is_refused():
    rows = [{"query": f"q{n}", "pos": ["the same", f"p{n}"]} for n in range(3)]
    assert "f: pos: found the same text first in the list of every row; write [[instruction, text]]" in refusal(*rows)
    assert len(texts(*rows, {"query": "q", "pos": ["x", "y", "z"]})) == 4, "control"


def test_a_query_is_one_text():
    assert texts({"query": ["rain"], "pos": "p"}) == [("rain", ["p"], [])]
    assert texts({"query": ["Find: ", "rain"], "pos": "p"}) == [(["Find: ", "rain"], ["p"], [])]
    assert "query: found a list of two texts, wanted a text" in refusal({"query": ["rain", "shower"], "pos": "p"})
    assert "query: found a list of 1, wanted" in refusal({"query": [["Find: ", "rain"]], "pos": "p"})
    assert "query: found a list of 3, wanted one text" in refusal({"query": ["a", "b", "c"], "pos": "p"})
    same = [{"query": ["Represent the query", f"q{n}"], "pos": "p"} for n in range(3)]
    assert texts(*same)[0][0] == ["Represent the query ", "q0"]


# ---- what belongs to the texts of a row


def test_scores_stay_in_step_with_their_texts():
    row = {"query": "q", "pos": ["p"], "neg": ["n", "nan", None, "m"], "pos_scores": [1], "neg_scores": [3, 4, 0, 5]}
    ((example,), _, _) = read(row)
    assert (example.positives, example.positive_scores) == (["p"], [1])
    assert (example.negatives, example.negative_scores) == (["n", "m"], [3, 5])
    ((example,), _, _) = read({"query": "q", "pos": ["p"], "neg": ["n"], "scores": {"pos": [1], "neg": [2]}})
    assert (example.positive_scores, example.negative_scores) == ([1], [2])
    assert "neg_scores: found 2 scores, wanted one for each of 4 texts" in refusal(row | {"neg_scores": [1, 2]})


def test_a_prompt_in_the_rows_is_their_instruction():
    rows = [{"query": "q", "pos": "p", "prompt": "Find it"}, {"query": "r", "pos": "p", "prompt": None}]
    assert [example.instruction for example in read(*rows)[0]] == ["Find it", None]
    assert [example.instruction for example in read(*rows, ignore=["prompt"])[0]] == [None, None]
    many = [{"query": "q", "pos": "p", "prompt": f"Answer question {n}"} for n in range(30)]
    assert "found 30 different instructions in it; --ignore_columns prompt?" in refusal(*many)
    assert len(read(*many, ignore=["prompt"])[0]) == 30
    assert texts({"prompt": "a question", "chosen": "p", "rejected": "n"}) == [("a question", ["p"], ["n"])]


def test_rows_that_are_no_objects_are_bad():
    rows = [{"query": "q", "pos": "p"}, 7, None, ["a", "b"], "text"]
    found, _, bad = read(*rows, skip=True)
    assert len(found) == 1 and [message.split(":")[1] for message in bad] == ["2", "3", "4", "5"]
    assert refusal(7) == "f:1: found 7, wanted an object with named fields"
    assert refusal() == "f: found no row, wanted at least one"
    found, _, bad = read(["a", "b"], ["a"], {"query": "q"}, ["a", "b", "c"], skip=True)
    assert [(e.query, e.positives, e.negatives) for e in found] == [("a", ["b"], []), ("a", ["b"], ["c"])]
    assert len(bad) == 2


# ---- what would be misread in silence: refused, or read rightly

PASSAGES = [{"text": "Water.", "has_answer": True}, {"text": "A loaf.", "has_answer": False}]
ONE, TWO = {"query": "what is rain", "document": "Water falls."}, {"query": "who wrote it", "document": "She did."}


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([ONE | {"kind": 1}, TWO | {"kind": 0}], "the column kind (0, 1) seems to say which pairs are positive"),
        ([ONE | {"kind": "Y"}, TWO | {"kind": "N"}, TWO | {"kind": " "}], "kind (N, Y) seems to say which pairs"),
        ([ONE | {"votes": 7}], "votes (7) seems to say which pairs are positive"),
        ([{"query": "q r", "documents": ["a", "b"], "order": [2, 1]}], "order (1, 2) seems to say which pairs"),
        ([ONE | {"part": "train_01"}, TWO | {"part": "test_01"}], "part (test_01, train_01) names splits"),
        ([ONE | {"set": "train"}, TWO | {"set": "test"}], "set (test, train) names splits"),
        ([ONE | {"Usage": "Public"}, TWO | {"Usage": "Private"}], "Usage (Private, Public) names splits"),
        ([ONE | {"Bewertung": "ja"}, TWO | {"Bewertung": "nein"}], "Bewertung (ja, nein) seems to say which pairs"),
        ([{"query": "q r", "pos": ["Do as follows:", "Boil it."]}], "others two texts"),
        ([{"query": f"q {n}", "pos": [f"Represent text {n}.", f"p {n}"]} for n in range(3)], "others two texts"),
        ([{"query": "q r", "docs": [{"text": "a", "holds": 1}, {"text": "b", "holds": 0}]}], "have the field holds"),
        ([["A man eats.", "He eats.", "entailment"], ["A dog runs.", "It naps.", "neutral"]], "words of labels"),
        ([["q1", "what is rain", "Water."], ["q2", "who wrote it", "She did."]], "query holds ids (q1, q2)"),
        ([["Go.", "Va !", "CC-BY 2.0 (France) no. 1"], ["Hi.", "Oh !", "CC-BY 2.0 (France) no. 2"]], "the same in all"),
        ([["question", "passage"], ["what is rain", "Water."]], "f:1: found 'question' and 'passage', the names"),
        ([ONE, {"query": "---", "document": ":---"}], "f:2: found '---' and ':---', the line below a header"),
        ([{"question": "what is it", "answer": "I"}, {"question": "and who", "answer": "F"}], "single letters (I, F)"),
        ([{"question": "q r", "ctxs": PASSAGES}], "the passages in ctxs have the field has_answer"),
        ([{"question": "q r", "positives": PASSAGES}], "the passages in positives have the field has_answer"),
        ([{"question": "q r", "docs": str(PASSAGES)}], "the passages in docs have the field has_answer"),
        ([{"query": "q r", "docs": [{"text": "a b", "type": "negative"}]}], "the passages in docs have the field type"),
        ([{"query": "q r", "response": [{"role": "user", "content": "q r"}]}], "found a chat message (role user)"),
        ([{"query": "q r", "positive": "{'text': array(['a'], dtype=object)}"}], "neither Python nor JSON"),
        ([{"query": "q r", "positive": '{"a b","c d"}'}], "neither Python nor JSON"),
        ([{"query": "q r", "pos": ["One.\n", "Two."]}, {"query": "s t", "pos": ["Three:", "F."]}], "others two texts"),
        ([{"query": q, "pos": pos} for q, pos in (("q", ["D: ", "a"]), ("r", ["D: ", "b"]), ("s", "c"))], "others two"),
    ],
)  # fmt: skip
def test_what_would_be_misread_is_refused(rows, found):
    assert found in refusal(*rows)


@pytest.mark.parametrize(
    "row",
    [{"id": 0}, {"lang": "en"}, {"kind": 1}, {"embedding": [0.5, 0.25]}, {"set": 3}, {"target_language": "fr"}],
)
def test_control_other_columns_stop_nothing(row):
    assert len(texts(ONE | row, TWO | row)) == 2


@pytest.mark.parametrize("word", ["\\N", "(null)", "[NULL]", "undefined", "#DIV/0!", "No Answer Present.", "[deleted]"])
def test_more_words_of_empty_cells(word):
    assert texts({"query": "q", "positive": "p", "negative": word}) == [("q", ["p"], [])]


def test_a_text_like_a_list_is_decoded_from_tables_alone():
    row = [("f:1", {"question": "What is printed?", "answer": "['a', 'b']"})]
    for source, wanted in (("f.csv", ["a", "b"]), ("f.jsonl", ["['a', 'b']"]), ("f.parquet", ["['a', 'b']"])):
        found = [*examples_of(row, source, Columns(), BadRows(False), Reading())]
        assert found[0].positives == wanted


def test_a_flag_inside_passages_is_no_number_of_the_passage():
    numbered = {"query": "q", "docs": [{"text": "a", "place": 0}, {"text": "b", "place": 1}]}
    assert texts(numbered) == [("q", ["a", "b"], [])], "control"


@pytest.mark.parametrize(
    ("late", "found"),
    [("negative", "kind (negative) seems to say"), ("test", "kind (test) names splits"), (None, "")],
    ids=["a label", "a split", "control: nothing"],
)
def test_values_that_come_late_stop_the_reading(monkeypatch, late, found):
    monkeypatch.setattr("gritlm.data.columns.LOOKED_AT", 2)
    monkeypatch.setattr("gritlm.data.roles.LOOKED_AT", 2)
    rows = [{"query": "q", "positive": "p", "kind": kind} for kind in (None, None, late)]
    if found:
        assert found in refusal(*rows)
    assert len(texts(*rows, ignore=["kind"] if found else [])) == 3


def test_an_unread_column_of_few_values_or_fractions_is_named_with_them():
    rows = [ONE | {"human": value, "sort": "ab"[n % 2], "url": f"u{n}"} for n, value in enumerate((4.5, 1, 2, 0))]
    assert read(*rows)[1].lines()[0].endswith(
        "; not read: human (0, 1, 2, 4.5: a label?), sort (a, b: a label?), url"
    )  # fmt: skip
    assert read(*rows, ignore=["human", "sort"])[1].lines()[0].endswith("; not read: human, sort, url"), "control"


def test_lists_of_two_texts_that_come_late_are_counted():
    rows = [{"query": "q", "positive": "p"}] * 3 + [{"query": "q", "positive": ["Do this: ", "p"]}]
    found, reading, _ = read(*rows)
    assert found[-1].positives == ["Do this: ", "p"] and "1 lists of two texts, read as two" in reading.lines()[1]
    assert len(read(*rows[:3])[1].lines()) == 1, "control"


def test_passages_with_flags_are_told_although_the_first_row_has_none():
    rows = [{"query": "q", "passages": flags} for flags in ([], [{"is_selected": 1, "text": "p"}])]
    found, reading, _ = read(*rows)
    assert [example.positives for example in found] == [["p"]]
    assert "1 rows left out without a passage that is flagged" in reading.lines()


def test_scores_in_the_cells_of_a_table_are_numbers():
    row = ("f:2", {"query": "q", "pos": "p", "neg": "['n', 'm']", "pos_scores": "0.9", "neg_scores": "[0.2, 0.1]"})
    (found,) = examples_of([row], "f.csv", Columns(), BadRows(), Reading())
    assert (found.positive_scores, found.negative_scores) == ([0.9], [0.2, 0.1])


def test_labels_with_spaces_unanswered_questions_and_all_texts_of_an_example():
    rows = [{"query": "q", "text": "p", "label": "yes "}, {"query": "q", "text": "n", "label": "no"}]
    assert texts(*rows, label="label", positive_labels=["yes"]) == [("q", ["p"], ["n"])]
    squad = [{"question": "q", "context": "c", "answers": {"text": t, "answer_start": t and [0]}} for t in (["c"], [])]
    assert texts(*squad) == [("q", ["c"], [])]
    listed = [{"question": "q", "context": "c", "answers": a} for a in ([{"text": "c", "answer_start": 0}], [])]
    assert texts(*listed) == [("q", ["c"], [])]
    assert texts({"texts": ["q", "p", "n", "o"]}) == [("q", ["p"], ["n", "o"])]
    assert "found the columns id, texts" in refusal({"id": 1, "texts": "hello there"})
