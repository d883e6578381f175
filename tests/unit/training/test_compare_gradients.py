"""The reference of `gritlm verify-gradients --temperatures` is float64 from the first token to the last sum."""

import pytest
import torch

from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.embedder import Embedder
from gritlm.models.text import TextContract
from gritlm.training.compare_gradients import Case, one_process, relative_error
from gritlm.training.objective import needs_projection
from gritlm.training.random_texts import TEACHER_WIDTH
from gritlm.training.terms import VARIANTS

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_no_step_of_the_reference_is_in_float32(qwen3, name):
    """Padded and packed texts add up in another order: in float64 the gradients agree to 1e-12, in float32 to 1e-5."""
    case = Case(name, hard=True, queries=4, max_len=16, chunk_tokens=16, steps=1, temperature=0.05)
    (texts,), errors = case.batches(600), {}
    for float64 in (True, False):
        found = []
        for packed in (True, False):
            model = Embedder(load_backbone(str(qwen3), load_config(str(qwen3), "bb"), "packed"), TextContract())
            if needs_projection(case.flags):
                torch.manual_seed(0)
                model.add_teacher_projection(TEACHER_WIDTH)
            ((loss, gradient, *_),) = one_process(model.train(), case, [texts], CPU, packed=packed, float64=float64)
            assert loss.dtype == (torch.float64 if float64 else torch.float32)
            found.append(gradient)
        errors[float64] = relative_error(*found)
    assert errors[True] < 1e-12
    assert 1e-8 < errors[False] < 1e-5, "control: float32"
