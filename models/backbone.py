"""Load a decoder LLM and make it an text_tokenizer; prove by probe that its attention is what was asked for.

Since transformers 5.2 `config.is_causal = False` alone makes a stock Qwen2/Qwen3 bidirectional, on every
attention implementation, and `config.json` carries it to every loader. Nothing is patched.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, set_seed

from gritlm.errors import UserError
from gritlm.models.attention import PACKED

SUPPORTED = ("qwen2", "qwen3")
ATTENTION = {"bb": False, "cc": True}


def load_config(name_or_path: str, attn: str = "bb", trust_remote_code: bool = False) -> PreTrainedConfig:
    """The backbone's config with `is_causal` set for `attn` (bb: bidirectional, cc: causal). Loads no weights.

    Raises:
        UserError: the model does not exist, is not supported, or limits attention in another way.
    """
    if name_or_path.startswith((".", "/", "~")) and not (Path(name_or_path) / "config.json").is_file():
        raise UserError(f"--model_name_or_path {name_or_path}: found no config.json there, wanted a model folder")
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model_name_or_path {name_or_path}: neither a model folder nor a model that the hub gives: "
            + str(error).strip().splitlines()[0]
        ) from error
    if config.model_type not in SUPPORTED:
        raise UserError(
            f"--model_name_or_path {name_or_path}: found a {config.model_type!r} backbone, wanted one of {SUPPORTED}"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise UserError(f"--model_name_or_path {name_or_path}: sliding-window layers are not supported")
    config.is_causal = ATTENTION[attn]
    return config


def load_backbone(
    name_or_path: str,
    config: PreTrainedConfig,
    attn_implementation: str = PACKED,
    reset_weight: bool = False,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The decoder stack without its language-model head, float32 weights.

    Float32 because bf16 weights under AdamW at a fine-tuning learning rate stand still; bf16 comes from autocast.
    `reset_weight` draws the weights from the model's own initialisation (seeded) and reads none from disk.
    """
    options = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    try:
        if reset_weight:
            set_seed(seed)
            return AutoModel.from_config(config, dtype=torch.float32, **options)
        backbone, report = AutoModel.from_pretrained(
            name_or_path, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ImportError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        if isinstance(error, ImportError) or "attn_implementation" in why:
            raise UserError(f"--attn_implementation {attn_implementation}: {why}; packed works everywhere") from error
        raise UserError(f"--model_name_or_path {name_or_path}: {why}") from error
    if report["missing_keys"]:
        raise UserError(
            f"--model_name_or_path {name_or_path}: {len(report['missing_keys'])} weights are missing, "
            f"first {sorted(report['missing_keys'])[0]!r}"
        )
    return backbone
