"""The workload's texts, and the clocks and formulas that a benchmark relies on."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from gritlm.benchmark.workload import measure, memory_in_use, model_config, useful_flops, write_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("uniform", [False, True])
def test_no_text_appears_twice(tmp_path, uniform):
    pairs = [(f"summary {n}", f"code {n}") for n in range(10)]
    write_rows(tmp_path / "rows.jsonl", pairs, rows=8, group=3, uniform=uniform)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    passages = [text for row in rows for text in row["pos"] + row["neg"]]
    assert (len(rows), len(passages)) == (8, 24), "control: more passages than pairs"
    assert len(set(passages)) == 24 and len({row["query"] for row in rows}) == 8


def test_useful_flops_are_those_of_the_matrix_products():
    config, lengths = model_config("tiny"), np.array([100, 50, 7])
    with torch.device("meta"):
        model = AutoModel.from_config(config)
        texts = [torch.zeros(1, int(length), dtype=torch.long) for length in lengths]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for ids in texts:
            model(input_ids=ids, attention_mask={"full_attention": None}, use_cache=False)
    counted = 3 * counter.get_total_flops()  # a backward pass has two products for each of the forward pass
    assert abs(useful_flops(config, lengths) / counted - 1) < 2e-3
    split = np.array([50, 50, 50, 7])
    assert abs(useful_flops(config, split) / counted - 1) > 5e-3, "control: the same tokens with less attention"


def test_the_peak_includes_memory_that_is_freed_again():
    before = memory_in_use(CPU)
    sums = {size: measure(lambda size=size: torch.ones(size).sum(), CPU) for size in (10, 25_000_000)}
    assert [result.item() for result, _, _ in sums.values()] == [10, 25_000_000]
    small, large = (peak - before for _, _, peak in sums.values())
    assert large > 90e6 and small < 50e6
    assert all(seconds > 0 for _, seconds, _ in sums.values())
