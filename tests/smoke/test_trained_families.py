"""Runs of tiny models of the families of the table: resumed to the bit, and served as they were trained.

tests/family_checks.py runs every cell of docs/backbones.md; here are some of them.
"""

import re

import pytest
from family_checks import CELLS, resumed, served
from helpers import ROOT

from gritlm.models.families import FAMILIES


def others(*short: str, of=FAMILIES) -> list:
    """Those of the short suite, and the rest of a list for the long stage."""
    return [*short, *(pytest.param(name, marks=pytest.mark.long) for name in of if name not in short)]


@pytest.mark.parametrize("name", others("bert"))
def test_a_run_is_served_as_it_was_trained(name, tmp_path):
    assert float(served(name, tmp_path)) > 0.9999


@pytest.mark.parametrize("name", others("gemma3_text", of=["qwen3_moe", "nomic_bert", "xlm-roberta", "mistral"]))
def test_a_run_resumes_to_the_bit(name, tmp_path):
    assert resumed(name, tmp_path) == "same bytes"


def test_the_documented_table_has_every_family_and_no_failure():
    text = (ROOT / "docs" / "backbones.md").read_text()
    rows = re.findall(r"^\| `(\S+)`[^|]* \|(.*)\|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == list(FAMILIES)
    assert all(len(row.split("|")) == len(CELLS) for _, row in rows)
    for numbers in re.findall(r"\d+e-\d+", text):
        assert float(numbers) < 1e-5
