"""Every pooling method, computed by hand."""

import torch

from gritlm.models.pooling import pool, positions

STATES, LENGTHS, PROMPT_LENGTHS = torch.arange(18.0).view(6, 3), torch.tensor([2, 4]), torch.tensor([0, 2])


def test_each_method_pools_the_tokens_after_the_prompt():
    first, second = STATES[:2], STATES[4:]
    assert torch.equal(pool(STATES, LENGTHS, PROMPT_LENGTHS, "mean"), torch.stack([first.mean(0), second.mean(0)]))
    weighted = pool(STATES, LENGTHS, PROMPT_LENGTHS, "weightedmean")
    assert torch.allclose(weighted[0], (1 * first[0] + 2 * first[1]) / 3)
    assert torch.allclose(weighted[1], (3 * second[0] + 4 * second[1]) / 7), "positions count the prompt"
    assert torch.equal(pool(STATES, LENGTHS, PROMPT_LENGTHS, "lasttoken"), STATES[[1, 5]])
    assert torch.equal(pool(STATES, LENGTHS, PROMPT_LENGTHS, "cls"), STATES[[0, 4]])


def test_control_without_a_prompt_other_tokens_are_pooled():
    no_prompt = torch.zeros(2, dtype=torch.long)
    for method in ("mean", "weightedmean", "cls"):
        with_prompt, without = (pool(STATES, LENGTHS, p, method) for p in (PROMPT_LENGTHS, no_prompt))
        assert torch.equal(with_prompt[0], without[0])
        assert not torch.allclose(with_prompt[1], without[1])


def test_vectors_are_float32_for_states_of_any_dtype():
    assert pool(STATES.bfloat16(), LENGTHS, PROMPT_LENGTHS, "mean").dtype == torch.float32


def test_positions_start_anew_in_each_text():
    assert positions(LENGTHS, 6).tolist() == [0, 1, 0, 1, 2, 3]
