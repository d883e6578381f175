"""The counted work of a chunk: against sums by hand."""

import torch
from transformers import Qwen3Config

from gritlm.benchmark.predict import GPUS, CountWork, Work, count_work, seconds

WIDTH, INNER, LAYERS, HEADS, HEAD, TOKENS, LENGTH = 64, 192, 3, 4, 16, 96, 32


def config(**more):
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "head_dim": HEAD}
    return Qwen3Config(num_attention_heads=HEADS, num_key_value_heads=2, vocab_size=100, **sizes | more)


def test_products_and_attention_are_those_of_the_formulas():
    weights = LAYERS * (WIDTH * HEADS * HEAD * 2 + WIDTH * 2 * HEAD * 2 + 3 * WIDTH * INNER)
    kept, _ = count_work(config(), TOKENS, LENGTH, "none", False)
    assert kept.products == 6 * weights * TOKENS
    assert kept.attention == 3.5 * 4 * LAYERS * HEADS * HEAD * LENGTH * TOKENS
    twice, _ = count_work(config(), TOKENS, LENGTH, "none", True)
    assert twice.products == 8 * weights * TOKENS
    selective, _ = count_work(config(), TOKENS, LENGTH, "selective", False)
    assert selective.products == kept.products and kept.bytes < selective.bytes < twice.bytes
    wider, _ = count_work(config(intermediate_size=2 * INNER), TOKENS, LENGTH, "none", False)
    assert wider.products > kept.products, "control"


def test_bytes_are_those_read_and_written():
    a, b = torch.ones(100), torch.ones(100, dtype=torch.bfloat16)
    with CountWork() as count:
        a * a
        a.view(10, 10).t().detach()
        b.float()
    assert count.work.kernels == 2 and count.work.bytes == 800 + 600
    assert count.bytes_of == {"mul": 800, "_to_copy": 600}


def test_a_chunk_waits_for_memory_or_for_the_host():
    found = seconds(Work(kernels=10, bytes=int(4.2e12), products=743 * 10**12), GPUS["h200"])
    assert found["all"] == 2.0 and found["host"] < 1e-3
    assert seconds(Work(kernels=100_000), GPUS["h200"])["all"] == 3.0
