"""prepare and check-data start without the libraries that take seconds to import."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import run

ROWS = [{"query": ["Q: ", "what is it"], "pos": ["this"], "neg": ["that"]}]
# Runs a verb, then prints which of the slow libraries it imported.
PROGRAM = """
import atexit, sys
from gritlm.__main__ import main
slow = {"torch", "transformers", "datasets", "pandas"}
atexit.register(lambda: print("imported:", *sorted(slow & sys.modules.keys())))
sys.exit(main())
"""


@pytest.fixture(params=["jsonl", "parquet"])
def path(request, tmp_path):
    path = tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def imported_by(*arguments) -> list[str]:
    done = run("-c", PROGRAM, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].removeprefix("imported:").split()


@pytest.mark.parametrize("verb", ["prepare", "check-data"])
def test_help_imports_no_slow_library(verb):
    assert imported_by(verb, "--help") == []


def test_prepare_imports_no_slow_library(path, tmp_path):
    assert imported_by("prepare", path, tmp_path / "out") == []
    assert (tmp_path / "out" / "train" / "rows.jsonl").is_file()


def test_check_data_imports_no_slow_library(path):
    assert imported_by("check-data", path) == []


def test_control_check_data_with_a_model_imports_transformers(tmp_path, qwen3):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert "transformers" in imported_by("check-data", tmp_path / "rows.jsonl", "--model_name_or_path", qwen3)
