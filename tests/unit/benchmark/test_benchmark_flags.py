"""Flags of `gritlm benchmark` that cannot be met are one line, before anything is built."""

import pytest

from gritlm.benchmark import benchmark
from gritlm.cli import run_verb

CASES = {
    "loss --width 0": "--width: found 0, wanted at least 2",
    "memory --max_len 0": "--max_len: found 0, wanted at least 1",
    "encode --lengths uniform:x": "--lengths: found 'uniform:x', wanted a number of tokens",
    "--activation_memory -1": "argument --activation_memory: invalid auto_or_gb value: '-1'",
    "--attn_implementation foo": "argument --attn_implementation: invalid choice: 'foo'",
    "step --compare sentence-transformers --terms same_tower": "wanted info_nce first in --terms",
    "step --adapter lora": "--adapter lora: found the measure step, wanted memory",
}


@pytest.mark.parametrize("words", CASES)
def test_a_wrong_flag_is_one_line(words, capsys):
    assert run_verb(benchmark.main, words.split()) == 2
    printed = capsys.readouterr()
    assert CASES[words] in printed.err and printed.err.count("\n") == 1 and not printed.out
