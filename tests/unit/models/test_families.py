"""Every family of the table, and families outside it: what is packed, padded, trained or refused by name."""

import json
import re
import warnings

import pytest
import torch
from families import build_family
from helpers import flat_gradient, relative
from torch.nn.utils.rnn import pad_sequence
from transformers import CONFIG_MAPPING, AutoModel, set_seed

from gritlm.errors import UserError
from gritlm.models import attention, embedder, probe
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.base import read_base
from gritlm.models.checks import check_base
from gritlm.models.embedder import Embedder
from gritlm.models.families import FAMILIES, SIZES, is_causal, is_encoder, model_options, set_causal, tiny_config
from gritlm.models.probe import AttentionError, choose_attention, probe_attention
from gritlm.models.text import TextContract

CPU = torch.device("cpu")
WINDOWED = [name for name in FAMILIES if getattr(tiny_config(name), "sliding_window", None)]


def make(name: str, attn: str = "bb", implementation: str = "packed") -> Embedder:
    """A tiny model of a family, in training mode. Every kind of layer is there, and a window of 16 or 8."""
    config = tiny_config(name, attn == "cc")
    set_seed(0)
    options = model_options(config) | {"attn_implementation": implementation, "dtype": torch.float32}
    return Embedder(AutoModel.from_config(config, **options), TextContract(normalized=False))


def chunks_of(lengths: tuple[int, ...]) -> list[dict]:
    """The same random texts as one packed row, and as a padded batch."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, 600, (length,), generator=generator) for length in lengths]
    numbers = {"lengths": torch.tensor(lengths), "prompt_lengths": torch.tensor([3, 0, 2, 0, 0])}
    runs = tuple((1, length) for length in lengths)
    return [
        numbers | {"input_ids": torch.cat(texts), "equal_length_runs": runs},
        numbers | {"input_ids": pad_sequence(texts, batch_first=True)},
    ]


def vectors_and_gradient(model: Embedder, chunk: dict) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    vectors = model(**chunk)
    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
    return vectors.detach(), flat_gradient(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_padded_and_the_probe_passes(name):
    packed, padded = chunks_of((64, 40, 12, 12, 7))
    for attn in ("bb",) if is_encoder(name) else ("bb", "cc"):
        model = make(name, attn)
        assert is_causal(model.config) == (attn == "cc")
        changes = probe_attention(model, model, CPU, attn)
        assert (changes["last_to_first"] > 1e-4) == (attn == "bb") and "packed_long" in changes
        (vectors, gradient), wanted = vectors_and_gradient(model, packed), vectors_and_gradient(model, padded)
        assert relative(vectors, wanted[0]) < 1e-5 and relative(gradient, wanted[1]) < 1e-5
        eager = make(name, attn, "eager")
        eager.load_state_dict(model.state_dict())
        assert relative(vectors, vectors_and_gradient(eager, padded)[0]) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_has_a_gradient_but_those_that_the_table_names(name):
    model = make(name)
    vectors_and_gradient(model, chunks_of((64, 40, 12, 12, 7))[0])
    whole = flat_gradient(model).norm()
    without = [name for name, weight in model.named_parameters() if weight.grad.norm() < 1e-6 * whole]
    assert all(weight.endswith(FAMILIES[name].no_gradient) for weight in without), without


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_is_the_familys_own_and_symmetric(name):
    """One layer: a change reaches as far as the window, to both sides alike, and no farther."""
    config = tiny_config(name)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention"]
    set_seed(0)
    options = model_options(config) | {"attn_implementation": "packed"}
    model = AutoModel.from_config(config, **options).eval()
    ids = torch.randint(2, 600, (64,), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[32] = ids[32] % 500 + 2
    packing = attention.Packing(((1, 64),), torch.tensor([0, 64], dtype=torch.int32))

    def states(row: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=row[None], attention_mask=torch.ones_like(row)[None], packing=packing)[0][0]

    moved = (states(ids) - states(changed)).norm(dim=1).nonzero().flatten()
    reach = {"gemma3_text": 8}.get(name, 16)  # transformers halves Gemma 3's window where it is bidirectional
    assert (moved.min(), moved.max()) == (32 - reach, 32 + reach)


def without_window(self, longest):
    return attention.Band(-1, 0 if is_causal(self.options["config"]) else -1)


@pytest.mark.parametrize("name", WINDOWED)
def test_control_the_probe_sees_a_window_left_out(name, monkeypatch):
    monkeypatch.setattr(attention.Mask, "band", without_window)
    model = make(name)
    with pytest.raises(AttentionError, match="packed_long"):
        probe_attention(model, model, CPU, "bb")


@pytest.mark.parametrize("name", ["bert", "xlm-roberta"])
def test_control_the_probe_sees_positions_that_do_not_restart_or_begin_wrongly(name, monkeypatch):
    monkeypatch.setattr(embedder.Embedder, "_positions", lambda self, ids, lengths: torch.arange(len(ids)) % 500)
    model = make(name)
    with pytest.raises(AttentionError, match="packed"):
        probe_attention(model, model, CPU, "bb")


def test_a_layer_that_stays_causal_is_refused(monkeypatch):
    """The sliding layers alone: the full ones would hide them from a look at the first token."""
    band = attention.Mask.band

    def half(self, longest):
        found = band(self, longest)
        return found._replace(after=0) if self.options.get("local_size") else found

    monkeypatch.setattr(attention.Mask, "band", half)
    model = make("olmo3")
    with pytest.raises(UserError, match=r"found a layer that attends to Band\(.*\), wanted symmetric"):
        probe_attention(model, model, CPU, "bb")


def test_a_pad_token_within_a_text_keeps_its_position_packed():
    """RoBERTa gives it none, and its positions come from the ids."""
    model, (packed, padded) = make("roberta").eval(), chunks_of((64, 40, 12, 12, 7))
    pad = model.config.pad_token_id
    for place in (3, 64 + 5):
        packed["input_ids"][place] = pad
    padded["input_ids"][0, 3] = padded["input_ids"][1, 5] = pad
    assert relative(model(**packed), model(**padded)) < 1e-5


# ---- what a folder's config says


def test_gemma_changes_its_window_with_its_direction_and_is_saved_as_it_was():
    causal = tiny_config("gemma3_text", causal=True)
    both = set_causal(causal, False)
    assert (causal.sliding_window, both.sliding_window, both.to_dict()["sliding_window"]) == (16, 9, 16)
    assert set_causal(both, True).sliding_window == 16 and not hasattr(both, "is_causal")


def test_a_base_says_its_direction_and_what_stands_around_a_text(tmp_path):
    for name, attn, append_eos in (
        *(("gemma3_text", None, None), ("mistral", None, None), ("bert", "bb", True)),
        *(("roberta", "bb", True), ("xlm-roberta", "bb", True), ("llama", None, None)),
    ):
        says = read_base(str(build_family(tmp_path / name, name)))
        assert (says.attn, says.append_eos) == (attn, append_eos), name


def test_causal_attention_of_an_encoder_is_refused(tmp_path):
    build_family(tmp_path, "bert")
    with pytest.raises(UserError, match="--attn cc: found 'bert', an encoder, wanted bb"):
        load_config(str(tmp_path), "cc")


def test_weights_of_an_old_bert_are_read_and_its_pooler_is_left_out(tmp_path):
    """As bert-base-uncased is saved: with a prefix, LayerNorm.gamma, position numbers, a pooler and a head."""
    from safetensors.torch import load_file, save_file

    build_family(tmp_path, "bert")
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {"bert." + re.sub(r"LayerNorm\.\w+", lambda m: renamed[m[0]], name): w for name, w in weights.items()}
    old |= {"bert.embeddings.position_ids": torch.arange(8), "bert.pooler.dense.weight": torch.ones(32, 32)}
    save_file(old | {"cls.predictions.bias": torch.ones(600)}, tmp_path / "model.safetensors", {"format": "pt"})
    config = load_config(str(tmp_path), "bb")
    (line,) = check_base(str(tmp_path), config)
    assert "weights outside the backbone are not used: 'pooler.dense.weight' and 1 more" in line
    backbone = load_backbone(str(tmp_path), config)
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    model = Embedder(backbone, TextContract())
    model.save_weights(tmp_path / "again")
    model.load_weights(tmp_path / "again")
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["qwen3_moe", "nomic_bert"])
def test_weights_that_are_saved_in_another_form_come_back(name, tmp_path):
    build_family(tmp_path, name)
    backbone = load_backbone(str(tmp_path), load_config(str(tmp_path), "bb"))
    model = Embedder(backbone, TextContract())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_weights(tmp_path / "again")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    model.load_weights(tmp_path / "again")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- refused, or outside the table


REFUSED = {
    "gemma2": ({}, "found 'gemma2' with a soft cap \\(attn_logit_softcapping 50\\)"),
    "qwen3_5_text": ({}, "found 'qwen3_5_text' with linear_attention layers"),
    "t5": ({}, "found 't5', an encoder-decoder"),
    "gemma3": ({}, "found 'gemma3', a model of more than text, wanted its text model \\('gemma3_text'\\)"),
    "qwen2_vl": ({}, "found 'qwen2_vl', a model of more than text"),
    "bert": ({"is_decoder": True}, "an encoder, with is_decoder or is_causal true"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name_before_weights_are_read(name, tmp_path):
    fields, message = REFUSED[name]
    warnings.simplefilter("ignore")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_MAPPING[name](**fields).to_dict(), default=str))
    with pytest.raises(UserError, match=message) as error:
        load_config(str(tmp_path), "bb")
    assert "\n" not in str(error.value)


UNTESTED = {  # model type -> fields, and the attention that its layers pass with
    "starcoder2": ({"num_key_value_heads": 2, "sliding_window": 16}, "packed"),
    "mixtral": ({"num_key_value_heads": 2, "num_local_experts": 4}, "packed"),
    "gpt2": ({"attn_pdrop": 0.0}, "packed"),
    "gpt_oss": ({"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}, "eager"),
    "bloom": ({}, "eager"),
}


@pytest.mark.parametrize("name", UNTESTED)
def test_a_family_outside_the_table_is_probed_and_packed_or_padded_with_a_line(name):
    fields, wanted = UNTESTED[name]
    config = set_causal(CONFIG_MAPPING[name](**SIZES | fields), False)
    state = torch.get_rng_state()
    implementation, line = choose_attention(config)
    assert implementation == wanted, line
    assert f"{name!r} is not among the tested families" in line and "\n" not in line
    assert ("it trains padded (" in line) == (wanted != "packed")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_weight_that_no_vector_depends_on_is_refused(monkeypatch):
    monkeypatch.setattr(probe, "_TRIED", {})
    config = CONFIG_MAPPING["electra"](**SIZES, embedding_size=32)
    choose_attention(config)
    original = probe.one_layer

    def with_pooler(*args, **options):
        model = original(*args, **options)
        model.pooler = torch.nn.Linear(2, 2)
        return model

    monkeypatch.setattr(probe, "_TRIED", {})
    monkeypatch.setattr(probe, "one_layer", with_pooler)
    with pytest.raises(UserError, match=r"no vector depends on 2 of its weights, first 'pooler\.weight'"):
        choose_attention(config)
