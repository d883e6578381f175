"""Evaluation queries are read from BEIR folders and found in other texts."""

import json

import pytest

from gritlm.curation.overlap import EvaluationTexts, read_evaluation_queries
from gritlm.errors import UserError


def test_equal_and_nearly_equal_texts_are_found_and_others_are_not():
    texts = EvaluationTexts(["The quick brown fox jumps over the lazy dog near the old river bank today", "short one"])
    assert texts.find("short one ") == "exact"
    assert texts.find("Short one!") == "near"
    assert texts.find("Yesterday the quick brown fox jumps over the lazy dog near the old river bank today") == "near"
    assert texts.find("The quick brown fox sleeps under a tree, far from the lazy dog and the old river bank") == ""
    assert texts.find("short") == ""


def test_vowel_signs_are_parts_of_words_and_wide_letters_are_letters():
    texts = EvaluationTexts(["किताब कहाँ है", "ｆｕｌｌ width"])
    assert texts.find("किताब कहाँ है?") == "near"
    assert texts.find("कितब कह है") == "", "control: without the vowel signs these are other words"
    assert texts.find("Full width") == "near"


def test_the_queries_of_a_beir_folder_are_those_of_its_test_split(tmp_path):
    (tmp_path / "qrels").mkdir()
    queries = [{"_id": "a b", "text": "one"}, {"_id": "a", "text": "two"}]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    qrels = tmp_path / "qrels" / "test.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\n\na b\td\t1\n")
    assert read_evaluation_queries(tmp_path) == ["one"]
    for content, message in ((b"a d 1\n", r"test\.tsv:1: found 'a d 1', wanted"), (b"a\xff\td\t1\n", "UTF-8 text")):
        qrels.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_evaluation_queries(tmp_path)
