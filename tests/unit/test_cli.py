"""The command line: every verb is listed, has help, and no module runs silently under python -m."""

import sys

import pytest
from helpers import run

from gritlm import VERBS
from gritlm.__main__ import HELP, main


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gritlm", verb, "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "examples" in capsys.readouterr().out


def test_every_verb_is_listed_and_has_a_line():
    listing = run("-m", "gritlm").stdout
    assert [line.split()[0] for line in listing.splitlines() if line.startswith("  ")] == list(VERBS)
    assert HELP.keys() == VERBS.keys()


def test_an_unknown_verb_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gritlm", "trian"])
    assert main() == 2
    assert "found verb 'trian', wanted one of train, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        ("gritlm.train", "-m gritlm train"),
        ("gritlm.verify_gradients", "-m gritlm verify-gradients"),
        ("gritlm.training.train", "-m gritlm train"),
        ("gritlm.curation", "-m gritlm VERB (one of train, "),
        ("gritlm.models.embedder", "-m gritlm VERB (one of train, "),
    ],
)
def test_a_module_is_not_run_silently(module, wanted):
    done = run("-m", module, "--seed", "1")
    assert done.returncode == 2
    assert done.stderr.startswith(f"gritlm: error: found -m {module}, wanted {wanted}")
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_options_of_python_before_the_module():
    assert "wanted -m gritlm train" in run("-Im", "gritlm.train").stderr
    assert run("-m", "gritlm", "--version").returncode == 0, "control"
