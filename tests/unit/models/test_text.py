"""The text contract on disk, and titles."""

import json

import pytest

from gritlm.models.text import CONTRACT_FILE, TextContract, titled


def test_a_contract_is_saved_and_loaded(tmp_path):
    contract = TextContract(64, 128, "lasttoken", False, True, True, {"query": "查询: ", "document": ""})
    contract.save(tmp_path)
    assert TextContract.load(tmp_path) == contract != TextContract()
    assert "查询" in (tmp_path / CONTRACT_FILE).read_text()


def test_an_unknown_field_is_an_error(tmp_path):
    """A field that this version does not know may change the meaning of the vectors."""
    (tmp_path / CONTRACT_FILE).write_text(json.dumps({"pooling_method": "mean", "layer": -2}))
    with pytest.raises(TypeError, match="layer"):
        TextContract.load(tmp_path)


def test_title_and_text_are_joined_by_a_space():
    assert titled({"title": "a", "text": "stone"}) == "a stone"
    assert titled({"title": None, "text": "stone"}) == titled({"text": "stone"}) == "stone"
