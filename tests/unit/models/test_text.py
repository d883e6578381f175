"""The text contract on disk, and the forms in which texts are given."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from gritlm.errors import UserError
from gritlm.models.text import CONTRACT_FILE, TextContract, list_passages, list_texts, titled

CATS, DOGS = {"_id": "d1", "title": "Cats", "text": "They purr."}, {"text": "Dogs bark."}
FRAME = pd.DataFrame({"title": ["Cats", "Dogs"], "text": ["They purr.", "They bark."]})


def test_a_contract_is_saved_and_loaded(tmp_path):
    contract = TextContract(64, 128, "lasttoken", False, True, True, {"query": "查询: ", "document": ""})
    contract.save(tmp_path)
    assert TextContract.load(tmp_path) == contract != TextContract()
    assert "查询" in (tmp_path / CONTRACT_FILE).read_text()


def test_an_unknown_field_is_an_error(tmp_path):
    """A field that this version does not know may change the meaning of the vectors."""
    (tmp_path / CONTRACT_FILE).write_text(json.dumps({"pooling_method": "mean", "layer": -2}))
    with pytest.raises(UserError, match="layer"):
        TextContract.load(tmp_path)


def test_title_and_text_are_joined_by_a_space():
    assert titled({"title": "a", "text": "stone"}, "here") == "a stone"
    assert titled({"title": None, "text": "stone"}, "here") == titled({"text": "stone"}, "here") == "stone"


def test_a_passage_without_text_is_its_title():
    assert titled({"title": "a", "text": None}, "here") == titled({"title": "a", "text": ""}, "here") == "a"
    assert titled({"text": ""}, "here") == "", "an empty text was given, so it is one"


@pytest.mark.parametrize(
    ("passage", "message"),
    [
        (None, "found None, wanted a string or {"),
        (3, "found int, wanted a string or {"),
        (["Cats", "They purr."], "found list, wanted a string or {"),
        ({"title": "Cats", "contents": "They purr."}, "found the keys ['title', 'contents'], wanted {"),
        ({"title": "", "text": None}, "text: found None and no title, wanted a string"),
        ({"text": None}, "text: found None and no title, wanted a string"),
        ({"title": "Cats", "text": float("nan")}, "text: found nan, wanted a string"),
        ({"title": 3, "text": "Cats"}, "title: found int, wanted a string"),
        ({"title": "\ud800", "text": "Cats"}, "title: found half of a surrogate pair, wanted valid Unicode"),
    ],
)
def test_what_is_no_passage_is_refused(passage, message):
    with pytest.raises(UserError, match=re.escape(f"here: {message}")):
        titled(passage, "here")


@pytest.mark.parametrize(
    "texts",
    [
        ["b", "a"],
        ("b", "a"),
        (text for text in "ba"),
        {"b": 1, "a": 2}.keys(),
        np.array(["b", "a"]),
        np.array(["b", "a"], dtype=object),
        pd.Series(["b", "a"], index=[7, 3]),
        pd.Series(["b", "a"], dtype="category"),
    ],
    ids=lambda texts: type(texts).__name__,
)
def test_texts_in_any_ordered_collection(texts):
    assert list_texts(texts) == ["b", "a"]


@pytest.mark.parametrize("value", [None, float("nan"), np.nan, pd.NA, 3, True, b"x", ["a"], {"text": "a"}, "\ud800"])
def test_one_bad_text_of_many_is_named(value):
    texts = ["a"] * 2000
    assert list_texts(texts) == texts, "control"
    texts[1234] = value
    for given in (texts, tuple(texts), iter(texts), pd.Series(texts, dtype=object)):
        with pytest.raises(UserError, match=r"^texts\[1234\]: found .*, wanted "):
            list_texts(given)
    if not isinstance(value, dict):  # which is a passage
        with pytest.raises(UserError, match=r"^corpus\[1234\]: found .*, wanted "):
            list_passages(texts)


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (FRAME, "DataFrame"),
        ({"q1": "what purrs"}, "dict"),
        (CATS, "dict"),
        ({}, "dict"),
        (b"bytes", "bytes"),
        (None, "None"),
        (3, "int"),
        (np.array("a"), "ndarray"),
        (FRAME.iloc[0], "Series"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(texts, kind):
    """A mapping and a data frame iterate over their keys, which are never texts."""
    with pytest.raises(UserError, match=f"^texts: found {kind}, wanted a string or a list"):
        list_texts(texts)


@pytest.mark.parametrize(
    ("corpus", "wanted"),
    [
        ([CATS, "Birds sing.", DOGS], ["Cats They purr.", "Birds sing.", "Dogs bark."]),
        ((passage for passage in (DOGS, CATS)), ["Dogs bark.", "Cats They purr."]),
        (np.array([DOGS, CATS]), ["Dogs bark.", "Cats They purr."]),
        (pd.Series({"d2": DOGS, "d1": CATS}), ["Dogs bark.", "Cats They purr."]),
        (CATS, ["Cats They purr."]),
        ({"title": "Cats", "text": None}, ["Cats"]),
        ({"d2": DOGS, "d1": CATS}, ["Dogs bark.", "Cats They purr."]),
        ({"text": DOGS, "d1": CATS}, ["Dogs bark.", "Cats They purr."]),
        ({"title": ["Cats", None], "text": ["They purr.", "x"]}, ["Cats They purr.", "x"]),
        ({"_id": [1, 2], "text": ["They purr.", "x"]}, ["They purr.", "x"]),
        ({"title": ["Cats", ""], "text": (None, "x")}, ["Cats", "x"]),
        (FRAME.to_dict("list"), ["Cats They purr.", "Dogs They bark."]),
        (FRAME.to_dict("series"), ["Cats They purr.", "Dogs They bark."]),
        (FRAME.to_dict("records"), ["Cats They purr.", "Dogs They bark."]),
        ({}, []),
        ([], []),
    ],
)
def test_every_form_of_a_corpus(corpus, wanted):
    assert list_passages(corpus) == wanted


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (FRAME, "corpus: found DataFrame, wanted a string or a list"),
        (FRAME.iloc[0], "corpus: found Series, wanted a string or a list"),
        (None, "corpus: found None, wanted a string or a list"),
        ([CATS, {"text": None}], "corpus[1]: text: found None and no title"),
        ([CATS, ["Cats", "They purr."]], "corpus[1]: found list, wanted"),
        ({"title": None, "text": None}, "corpus: text: found None and no title"),
        ({"title": "Cats", "contents": "They purr."}, "corpus['title']: found str, wanted {"),
        ({"d1": CATS, "d2": None}, "corpus['d2']: found None, wanted {"),
        ({"d1": CATS, "d2": {"text": 3}}, "corpus['d2']: text: found int, wanted a string"),
        ({"train": [CATS]}, "corpus['train']: found list, wanted {"),
        ({"title": ["Cats"], "text": ["a", "b"]}, "corpus: found 1 titles and 2 texts, wanted a title for each text"),
        ({"text": ["a", None]}, "corpus[1]: text: found None and no title"),
        ({"title": "ab", "text": ["a", "b"]}, "corpus['title']: found str, wanted a string or a list"),
        ({"title": ["a", "b"], "text": "ab"}, "corpus: title: found list, wanted a string"),
        ({"text": 3}, "corpus['text']: found int, wanted a string or a list"),
    ],
)
def test_what_is_no_corpus_is_refused(corpus, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        list_passages(corpus)
