"""The tests of 4-bit weights, with bitsandbytes in a folder of their own: installed, it would slow every start down."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.long


def test_4_bit_weights_with_bitsandbytes(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "more")]
    subprocess.run([*install, "bitsandbytes>=0.50"], check=True, capture_output=True, timeout=300)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "more")])}
    command = [sys.executable, "-m", "pytest", "-n0", "-rs", "tests/unit/models/test_lora.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "bitsandbytes is not installed" not in done.stdout, done.stdout[-3000:]
