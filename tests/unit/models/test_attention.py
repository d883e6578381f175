"""A packed text has the vector and the gradient that it has padded or alone."""

import pytest
import torch
from helpers import flat_gradient, make_embedder, relative
from torch.nn.utils.rnn import pad_sequence

from gritlm.models.attention import varlen_unavailable_reason
from gritlm.models.pooling import POOLING


def packed_and_padded(texts: list[torch.Tensor], prompt_lengths: list[int]) -> list[dict]:
    """The same texts (longest first) as one packed row, and as a padded batch."""
    numbers = {"lengths": torch.tensor([len(t) for t in texts]), "prompt_lengths": torch.tensor(prompt_lengths)}
    runs = tuple((1, len(t)) for t in texts)
    return [
        numbers | {"input_ids": torch.cat(texts), "equal_length_runs": runs},
        numbers | {"input_ids": pad_sequence(texts, batch_first=True)},
    ]


@pytest.mark.parametrize("attn", ["bb", "cc"])
@pytest.mark.parametrize("pooling", POOLING)
def test_a_text_has_the_same_vector_packed_padded_and_alone(base_model, attn, pooling):
    model = make_embedder(base_model, attn, pooling_method=pooling, projection=12).eval()
    texts, prompt_lengths = [torch.randint(1, 600, (n,)) for n in (40, 17, 17, 3, 1)], [9, 0, 3, 2, 0]
    packed, padded = (model(**chunk) for chunk in packed_and_padded(texts, prompt_lengths))
    assert relative(packed, padded) < 1e-6
    for vector, text, prompt_length in zip(packed, texts, prompt_lengths, strict=True):
        alone = model(text[None], torch.tensor([len(text)]), torch.tensor([prompt_length]))
        assert relative(vector, alone[0]) < 1e-5
    one_text = packed_and_padded([torch.cat(texts)], [0])[0]
    assert relative(model(**one_text), packed[:1]) > 1e-3, "control: one long text has another vector"


def test_packed_and_padded_texts_have_the_same_gradient(base_model):
    texts = [torch.randint(1, 600, (n,)) for n in (40, 17, 17, 1)]
    slopes = torch.linspace(-1, 1, 4 * 32).view(4, 32)
    packed, padded = packed_and_padded(texts, [9, 0, 3, 0])
    control = padded | {"prompt_lengths": torch.zeros(4, dtype=torch.long)}
    gradients = []
    for chunk in (packed, padded, control):
        model = make_embedder(base_model)
        (model(**chunk) * slopes).sum().backward()
        gradients.append(flat_gradient(model))
    assert relative(gradients[0], gradients[1]) < 1e-5
    assert relative(gradients[0], gradients[2]) > 1e-3, "control: other tokens are pooled"


def test_head_widths_that_the_kernel_does_not_take(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reasons = {width: varlen_unavailable_reason(torch.device("cuda"), True, 0.0, width) for width in (20, 64, 256, 264)}
    assert reasons[64] == reasons[256] == ""
    assert all(reasons[width].startswith(f"heads of width {width}, wanted") for width in (20, 264))
