"""What is counted of a GPU's memory without one: against tensors that have data, and what a process really takes."""

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
from gritlm.models.embedder import Embedder


def test_bytes_are_counted_while_they_live():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view = a[:10]
        b = a * 2
        assert live.now == 8000, "a view takes nothing of its own"
        del a
        assert live.now == 8000, "its view still holds it"
        del view
        assert (live.now, live.peak) == (4000, 8000)
        b += 1
        assert (live.now, live.peak) == (4000, 8000), "in place"


def test_without_data_the_count_is_the_same():
    config = model_config("tiny")
    model = Embedder(AutoModel.from_config(config, attn_implementation=PACKED)).train()
    found = count_chunk(model, 4, 32, bf16=True)
    assert found == chunk_footprint(config, 4 * 32, 32, bf16=True)
    assert found != chunk_footprint(config, 4 * 32, 16, bf16=True), "control: eight texts of half the length"
    checkpointed = chunk_footprint(config, 4 * 32, 32, bf16=True, gradient_checkpointing=True)
    assert checkpointed.kept < found.kept / 3 and checkpointed.peak < found.peak
    one = chunk_footprint(config, 1, 1)
    assert one.kept < one.weights / 50, "the weights themselves are not what a chunk takes"
    assert found.weights == checkpointed.weights == sum(4 * weight.numel() for weight in model.parameters())


def test_a_process_takes_what_is_counted():
    """Peak of the resident set, with an allocator that gives everything large back at once."""
    script = f"""
import torch
from transformers import AutoModel
from gritlm.benchmark.workload import memory_in_use, model_config, read_peak, reset_peak
from gritlm.models.embedder import Embedder
cpu = torch.device("cpu")
model = Embedder(AutoModel.from_config(model_config("tiny"), attn_implementation="{PACKED}")).train()
for texts in (2, 32):
    model.zero_grad(set_to_none=False)
    ids, lengths = torch.zeros(texts * 128, dtype=torch.long), torch.full((texts,), 128)
    base = memory_in_use(cpu)
    reset_peak(cpu)
    vectors = model(ids, lengths, torch.zeros_like(lengths), equal_length_runs=((texts, 128),))
    vectors.backward(torch.zeros_like(vectors))
print(read_peak(cpu) - base)
"""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    counted = chunk_footprint(model_config("tiny"), 32 * 128, 128).peak
    assert abs(float(done.stdout) / counted - 1) < 0.1
    assert counted > 1.5 * chunk_footprint(model_config("tiny"), 16 * 128, 128).peak, "control: half as many texts"


def test_the_verb(capsys, tmp_path):
    out = tmp_path / "out.json"
    with pytest.raises(UserError, match="--chunk_tokens 32 holds not even one text of --max_len 64"):
        main(["memory", "--chunk_tokens", "32", "--max_len", "64"])
    assert main(["memory", "--chunk_tokens", "520", "--max_len", "64", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["gradient checkpointing"]["peak"] < report["as it is"]["peak"]
    assert "a chunk of 512 tokens, as it is: +0.1 GB" in capsys.readouterr().out
