"""A run in a locale that knows ASCII only: all that it writes is UTF-8, and is read in any locale."""

import json
import locale
import sys

import pytest
from helpers import train_flags

from gritlm.models.text import TextContract
from gritlm.training.train import main

INSTRUCTION = "\u6307\u4ee4\uff1a\u68c0\u7d22\n\u67e5\u8be2\uff1a "
BINARY = (".safetensors", ".pt", ".pth", ".bin")


@pytest.fixture
def ascii_locale():
    if sys.flags.utf8_mode:
        pytest.skip("Python's UTF-8 mode overrides the locale")
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    yield
    locale.setlocale(locale.LC_CTYPE, before)


def test_a_run_writes_utf8(qwen3, tmp_path, ascii_locale, capfd):
    with pytest.raises(UnicodeEncodeError), open(tmp_path / "control", "w") as out:
        out.write(INSTRUCTION)
    rows = [{"query": [INSTRUCTION, f"{n}"], "pos": [f"\u7b54\u6848 {n}"], "neg": []} for n in range(16)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "d.jsonl").write_text(lines, encoding="utf-8")
    out = tmp_path / "\u6a21\u578b"
    assert main(train_flags(qwen3, tmp_path / "d.jsonl", out, tmp_path / "cache", max_steps=1)) == 0
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix not in BINARY]
    assert {"README.md", "tokenizer.json", "trainer_state.json", "run.json"} <= {path.name for path in files}
    for path in files:
        path.read_text(encoding="utf-8")
    assert TextContract.load(out).prompts["query"] == INSTRUCTION
    prompts = json.loads((out / "config_sentence_transformers.json").read_text(encoding="utf-8"))["prompts"]
    assert prompts["query"] == INSTRUCTION
