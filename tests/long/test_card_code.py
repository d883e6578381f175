"""The code of a card, in an environment that holds nothing but the library it names, prints the card's numbers."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import INSTRUCTION, make_model_folder

from gritlm.serving.export import main

pytestmark = pytest.mark.long

# What another library brings along (torch, transformers) is of the same environment; torch as here, without CUDA.
LIBRARIES = ("sentence-transformers", "transformers")


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of a new environment."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    install = [folder / "bin/python", "-m", "pip", "install", "--quiet", *LIBRARIES, f"torch=={torch.__version__}"]
    for command in ([sys.executable, "-m", "venv", folder], install):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            pytest.skip("pip takes more than ten minutes")
        if done.returncode:
            pytest.skip(f"pip cannot make the environment: {done.stderr.strip().splitlines()[-1:]}")
    return folder / "bin/python"


def printed(python: Path, code: str, folder: Path) -> np.ndarray:
    done = subprocess.run([python, "-I", "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.array([float(value) for value in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", done.stdout)])


def test_the_cards_code_prints_the_cards_numbers(qwen2, python, tmp_path):
    prompts = {"query": INSTRUCTION, "document": "Passage: "}
    make_model_folder(qwen2, tmp_path / "model", query_max_len=48, passage_max_len=48, projection=12, prompts=prompts)
    assert main([str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    (said,) = re.findall(r"but for rounding: ([-\d., ]+)\.\n", card)
    wanted = [float(value) for value in said.split(", ")]
    blocks = dict(re.findall(r"With ([a-z-]+):\n\n```python\n(.*?)```", card, re.DOTALL))
    for library in LIBRARIES:
        assert printed(python, blocks[library], tmp_path / "out") == pytest.approx(wanted, abs=1e-4), library
    without = blocks["sentence-transformers"].replace("encode_query", "encode")
    assert printed(python, without, tmp_path / "out") != pytest.approx(wanted, abs=1e-3), "control: without its prompt"
    done = subprocess.run([python, "-I", "-c", "import gritlm"], cwd=tmp_path, capture_output=True)
    assert done.returncode, "control: the environment holds this project"
