"""The families of backbones that are tested, and what sets one apart. Adding a family is one row of `FAMILIES`.

A family outside the table trains when the probe passes. Everything else here is read from the config or from
transformers' own tables.
"""

import copy
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from gritlm.errors import UserError


class Family(NamedTuple):
    """A row of `FAMILIES`.

    tiny: fields of a tiny config, beside `SIZES`: each kind of layer, bias and rotary embedding that the family has.
    no_gradient: ends of the names of weights that may have a gradient of zero.
    switch: the field of config.json that makes it bidirectional.
    positions_after_padding: it numbers positions from `pad_token_id` + 1 and gives padding tokens none.
    tokenizer: the form of its tokenizers, by its name in tests/families.py.
    """

    tiny: Mapping[str, Any] = MappingProxyType({})
    no_gradient: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    switch: str = "is_causal"
    positions_after_padding: bool = False


BY_BIDIRECTIONAL = "use_bidirectional_attention"

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 600,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
_KEY_BIASES = ("key.bias", "k_proj.bias")  # softmax does not change when all its scores change by the same
_BIASES = {"attention_bias": True, "mlp_bias": True}
_GQA = {"num_key_value_heads": 2}
_PARTIAL_ROTARY = {"partial_rotary_factor": 0.5, "resid_pdrop": 0.0}
_SHORT = {"max_position_embeddings": 514}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES: dict[str, Family] = {
    "qwen2": Family(_GQA | _WINDOW | {"use_sliding_window": True}, _KEY_BIASES),
    "qwen3": Family(_GQA | {"head_dim": 8}),
    "qwen3_moe": Family(_GQA | _EXPERTS | {"head_dim": 8, "mlp_only_layers": [1]}, ("mlp.experts",)),
    "llama": Family(_GQA | _BIASES, _KEY_BIASES, "begin"),
    "mistral": Family(_GQA | {"sliding_window": 16}, (), "sentencepiece"),
    "gemma3_text": Family(_GQA | _WINDOW | {"head_dim": 8}, (), "gemma", BY_BIDIRECTIONAL),
    "smollm3": Family(_GQA | _WINDOW | {"use_sliding_window": True, "no_rope_layers": [0, 1]}),
    "olmo2": Family(_GQA),
    "olmo3": Family(_GQA | _WINDOW),
    "granite": Family(_GQA | _BIASES | {"attention_multiplier": 0.2}, _KEY_BIASES),
    "phi": Family(_GQA | _PARTIAL_ROTARY, _KEY_BIASES),
    "phi3": Family(_GQA | _PARTIAL_ROTARY | {"sliding_window": 16}, (), "sentencepiece"),
    "modernbert": Family(
        _WINDOW | _BIASES | {"norm_bias": True, "cls_token_id": 1, "sep_token_id": 2}, _KEY_BIASES, "wordpiece"
    ),
    "bert": Family(_NO_DROPOUT, _KEY_BIASES, "wordpiece"),
    "roberta": Family(_NO_DROPOUT | _SHORT, _KEY_BIASES, "roberta", positions_after_padding=True),
    "xlm-roberta": Family(_NO_DROPOUT | _SHORT, _KEY_BIASES, "unigram", positions_after_padding=True),
    "nomic_bert": Family(_NO_DROPOUT, _KEY_BIASES, "wordpiece"),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The row of a config's family; an empty one outside the table."""
    return FAMILIES.get(config.model_type, Family())


def is_encoder(model_type: str) -> bool:
    """Whether a model of this type is bidirectional by itself."""
    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_causal(config: Any) -> bool:
    """Whether the attention of a model with this config is causal."""
    if family_of(config).switch == BY_BIDIRECTIONAL and config.use_bidirectional_attention:
        return False
    return not is_encoder(config.model_type) and getattr(config, "is_causal", True)


def set_causal(config: Any, causal: bool) -> PreTrainedConfig:
    """The config with causal or bidirectional attention.

    Raises:
        UserError: the model is an encoder, and `causal` is true.
    """
    if is_encoder(config.model_type):
        if causal:
            raise UserError(
                f"--attn cc: found {config.model_type!r}, an encoder, wanted bb: it has no causal attention"
            )
        return config
    if family_of(config).switch != BY_BIDIRECTIONAL:
        config.is_causal = causal
        return config
    # The class derives its window from the field when it is made.
    fields = config.to_dict() | {BY_BIDIRECTIONAL: not causal}
    fields.pop("is_causal", None)
    return type(config).from_dict(fields)


def tiny_config(model_type: str, causal: bool = False) -> PreTrainedConfig:
    """The tiny config of a family of the table."""
    return set_causal(CONFIG_MAPPING[model_type](**{**SIZES, **FAMILIES[model_type].tiny}), causal)


def model_class(config: PreTrainedConfig) -> Any:
    return MODEL_MAPPING[type(config)]


def model_options(config: PreTrainedConfig) -> dict[str, Any]:
    """Options that keep out modules whose output the vector does not use. Without a gradient they stop DDP."""
    if type(config) not in MODEL_MAPPING:  # code from the model's folder
        return {}
    takes = inspect.signature(model_class(config).__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}


def meta_model(config: PreTrainedConfig) -> Any:
    """The backbone without memory for its weights: names and shapes alone."""
    with torch.device("meta"):  # the class itself, since from_config would shard the weights under ZeRO-3
        return model_class(config)(copy.deepcopy(config), **model_options(config))


def is_converted(config: PreTrainedConfig) -> bool:
    """Whether transformers saves weights of this family in another form than the model has them."""
    return bool(get_checkpoint_conversion_mapping(config.model_type))


def longest_text(config: PreTrainedConfig) -> int | None:
    """The tokens that a model has positions for, if it says."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit - config.pad_token_id - 1 if limit and family_of(config).positions_after_padding else limit


def head_width(config: PreTrainedConfig) -> int:
    """The width of a head of attention."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def dropouts(config: PreTrainedConfig) -> tuple[float, float]:
    """The probability of dropping an attention weight, and the largest of any dropout in the backbone."""
    found = {key: value for key, value in config.to_dict().items() if "drop" in key and isinstance(value, int | float)}
    found = {key: value for key, value in found.items() if "classifier" not in key}
    return max((value for key, value in found.items() if "att" in key), default=0.0), max(found.values(), default=0.0)


def refuse(config: PreTrainedConfig) -> str:
    """Why a model with this config cannot be trained here; "" if it may be."""
    kind, text = config.model_type, config.get_text_config()
    cap = getattr(config, "attn_logit_softcapping", None)
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if getattr(config, "is_encoder_decoder", False):
        return f"found {kind!r}, an encoder-decoder, wanted a decoder or an encoder alone"
    if text is not config:
        return (
            f"found {kind!r}, a model of more than text, wanted its text model ({text.model_type!r}) in its own folder"
        )
    if type(config) not in MODEL_MAPPING and not getattr(config, "auto_map", None):
        return f"found {kind!r}, of which transformers has no model that gives states of tokens"
    if cap is not None:
        return (
            f"found {kind!r} with a soft cap (attn_logit_softcapping {cap:g}), which packed attention and sdpa have not"
        )
    if others:
        return f"found {kind!r} with {', '.join(sorted(others))} layers, wanted full_attention or sliding_attention"
    if is_encoder(kind) and (getattr(config, "is_decoder", False) or getattr(config, "is_causal", False)):
        return f"found {kind!r}, an encoder, with is_decoder or is_causal true in config.json, wanted it bidirectional"
    return ""
