"""The counted memory of a chunk, against tensors that have data and against the memory that a process uses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel

from gritlm.benchmark.benchmark import main
from gritlm.benchmark.memory import PACKED, LiveBytes, chunk_footprint, count_chunk
from gritlm.benchmark.workload import model_config
from gritlm.errors import UserError
from gritlm.models.attention import varlen_backward_bytes
from gritlm.models.embedder import Embedder
from gritlm.models.text import TextContract


def test_bytes_are_counted_while_they_live():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[:10]
        b = a * 2
        assert live.now == 8000, "a view adds nothing"
        del a
        assert live.now == 8000, "the view still holds it"
        del view
        assert (live.now, live.peak) == (4000, 8000)
        b += 1
        assert (live.now, live.peak) == (4000, 8000), "in place"


def test_the_working_memory_of_attention_is_part_of_the_peak():
    config = model_config("tiny")
    heads, width = config.num_attention_heads, config.head_dim
    assert varlen_backward_bytes(config, 32, 4) == 4 * (8 + 128) * heads * (width + -width % 32) * 4
    query, key, value = (torch.zeros(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    peaks = []
    for work in (0, 10**9):
        with LiveBytes(attention_work=work) as live:
            torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
        peaks.append(live.peak)
    assert 10**9 < peaks[1] < 10**9 + 2 * peaks[0] < 11 * 10**8


def test_the_count_is_the_same_without_data():
    config = model_config("tiny")
    model = Embedder(AutoModel.from_config(config, attn_implementation=PACKED), TextContract()).train()
    found = count_chunk(model, 4, 32, bf16=True)
    assert found == chunk_footprint(config, 4 * 32, 32, bf16=True)
    assert found != chunk_footprint(config, 4 * 32, 16, bf16=True), "control: eight texts of half the length"
    checkpointed = chunk_footprint(config, 4 * 32, 32, bf16=True, checkpointing="full")
    assert checkpointed.kept < found.kept / 3 and checkpointed.peak < found.peak
    one_token = chunk_footprint(config, 1, 1)
    assert one_token.kept < one_token.weights / 50, "a chunk's footprint does not include the weights"
    assert found.weights == checkpointed.weights == sum(4 * weight.numel() for weight in model.parameters())


def test_a_process_needs_the_memory_that_is_counted():
    """The peak of the resident set, with an allocator that returns large blocks at once."""
    script = f"""
import torch
from transformers import AutoModel
from gritlm.benchmark.workload import memory_in_use, model_config, read_peak, reset_peak
from gritlm.models.embedder import Embedder
from gritlm.models.text import TextContract
cpu = torch.device("cpu")
model = Embedder(AutoModel.from_config(model_config("tiny"), attn_implementation="{PACKED}"), TextContract()).train()
for texts in (2, 16):
    model.zero_grad(set_to_none=False)
    ids, lengths = torch.zeros(texts * 128, dtype=torch.long), torch.full((texts,), 128)
    before = memory_in_use(cpu)
    reset_peak(cpu)
    vectors = model(ids, lengths, torch.zeros_like(lengths), equal_length_runs=((texts, 128),))
    vectors.backward(torch.zeros_like(vectors))
print(read_peak(cpu) - before)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "THP_MEM_ALLOC_ENABLE": "0", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        counted, half = (chunk_footprint(model_config("tiny"), texts * 128, 128).peak for texts in (16, 8))
        used = float(process.communicate()[0])
    assert abs(used / counted - 1) < 0.1
    assert counted > 1.5 * half, "control: half as many texts"


def test_the_verb_reports_a_chunk_with_and_without_checkpointing(capsys, tmp_path):
    out = tmp_path / "out.json"
    with pytest.raises(UserError, match="--chunk_tokens 32 holds not even one text of --max_len 64"):
        main(["memory", "--chunk_tokens", "32", "--max_len", "64"])
    assert main(["memory", "--chunk_tokens", "520", "--max_len", "64", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["gradient checkpointing"]["peak"] < report["as it is"]["peak"]
    assert "a chunk of 512 tokens, as it is: +0.1 GB" in capsys.readouterr().out
