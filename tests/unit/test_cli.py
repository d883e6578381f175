"""The command line: every verb is listed, has help, and no module runs silently under python -m."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run

from gritlm import VERBS
from gritlm.__main__ import HELP, main
from gritlm.cli import run_verb, verb_parser
from gritlm.training.arguments import GROUPS
from gritlm.training.flag_parser import make_parser


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


# A verb that says much, and then writes a file. Needs no library, so that a new interpreter is cheap.
TALKS = """
import sys
from gritlm import cli
def main(argv):
    for stream in (sys.stdout, sys.stderr):
        print(argv[1] * 100_000, file=stream)
    open(argv[0], "x", encoding="utf-8").close()
if len(sys.argv) > 3: cli.guard_screen = lambda: None  # control
sys.exit(cli.run_verb(main, sys.argv[1:]))
"""


def start(command: str, *options: str, **env: str) -> subprocess.CompletedProcess:
    """A shell line in which $talks is the interpreter with `TALKS`; bare: without the installed packages."""
    talks = f'"{sys.executable}" -S {" ".join(options)} -c "$TALKS"'
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TALKS": TALKS} | env
    line = command.replace("$talks", talks)
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_reader_that_leaves_ends_nothing_and_leaves_no_traceback(tmp_path, options):
    done = start(f"$talks {tmp_path}/done line 2>&1 | head -c 1; exit ${{PIPESTATUS[0]}}", *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "l", "") and (tmp_path / "done").exists()
    control = start(f"$talks {tmp_path}/control line unguarded | head -c 1; exit ${{PIPESTATUS[0]}}", *options)
    assert control.returncode != 0 and "BrokenPipeError" in control.stderr and not (tmp_path / "control").exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_ends_nothing(tmp_path, closed):
    assert start(f"$talks {tmp_path}/done line {closed}").returncode == 0
    assert (tmp_path / "done").exists()


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_character_that_the_locale_lacks_is_escaped(tmp_path):
    word = "$'caf\\xc3\\xa9'"  # bytes that ASCII does not decode
    done = start(f"$talks {tmp_path}/done {word} | tail -c 5", **ASCII)
    assert done.returncode == 0 and done.stdout == "dca9\n" and (tmp_path / "done").exists()
    assert start(f"$talks {tmp_path}/utf8 {word} | tail -c 3", LC_ALL="C.UTF-8").stdout == "é\n", "control"


NAMES = """
import sys
from gritlm.cli import run_verb, verb_parser
def main(argv):
    parser = verb_parser("x", None, "")
    parser.add_argument("path", type=__import__("pathlib").Path)
    print(ascii(str(parser.parse_args(argv).path)))
sys.exit(run_verb(main, sys.argv[1:]))
"""


def test_a_name_that_the_locale_does_not_know_is_refused():
    done = start("$talks $'caf\\xc3\\xa9'", TALKS=NAMES, **ASCII)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert r"found b'caf\xc3\xa9', wanted text in the locale's encoding, ascii" in done.stderr
    assert start("$talks $'caf\\xc3\\xa9'", TALKS=NAMES, LC_ALL="C.UTF-8").stdout == "'caf\\xe9'\n", "control"
    done = start("$talks $'caf\\xe9'", TALKS=NAMES, LC_ALL="C.UTF-8")
    assert done.returncode == 2 and "wanted text in the locale's encoding, utf-8" in done.stderr


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    parser = verb_parser("x", None, "")
    parser.add_argument("paths", nargs="+", type=Path)
    assert parser.parse_args(["~/a", "b/~"]).paths == [Path("/home/of/mine/a"), Path("b/~")]
    names = ("model_name_or_path", "train_data", "num_samples", "data_cache", "output_dir", "resume_from_checkpoint")
    names += ("deepspeed", "fsdp_config")
    found = make_parser("train", GROUPS, "").parse_args([f"--{name}=~/{name}" for name in names])
    assert [getattr(found, name) for name in names] == [f"/home/of/mine/{name}" for name in names]
    assert make_parser("train", GROUPS, "").parse_args(["--query_prompt", "~"]).query_prompt == "~", "control"


def test_a_checkout_that_is_not_installed_is_imported_from_anywhere(tmp_path):
    """Also where a package of the same name is installed, such as the original."""
    (tmp_path / "site" / "gritlm").mkdir(parents=True)
    (tmp_path / "site" / "gritlm" / "__init__.py").write_text("original = True\n")

    def imported(checkout: Path) -> str:
        script = "import gritlm.models.text; from gritlm.data import folders; print(gritlm.models.text.__file__)"
        paths = f"{checkout}:{tmp_path / 'site'}"
        done = start(f'cd /; "{sys.executable}" -S -c "{script}"', PYTHONPATH=paths)
        return done.stdout.strip() or done.stderr.splitlines()[-1]

    assert imported(ROOT) == str(ROOT / "models" / "text.py")
    for room in ("gritlm", "models"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "gritlm" / "__init__.py").write_text("")
    assert "No module named 'gritlm.models'" in imported(tmp_path), "control"


def test_ctrl_c_is_one_line(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert run_verb(interrupted, []) == 130
    assert capsys.readouterr().err == "gritlm: interrupted\n"
