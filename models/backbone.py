"""Load the backbone of an embedding model: a decoder LLM, bidirectional or causal, or an encoder.

Since transformers 5.2 a field of the config (`is_causal`, for Gemma 3 `use_bidirectional_attention`) alone makes a
stock decoder bidirectional with every attention implementation, and config.json carries it to every loader. Nothing is
patched.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.distributed.utils import is_local_dist_rank_0
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.modeling_utils import set_zero3_state

from gritlm.distributed import rank
from gritlm.errors import UserError, first_line, one_line
from gritlm.models.attention import PACKED
from gritlm.models.base_files import find_file, unreadable
from gritlm.models.checks import check_base, find_adapter
from gritlm.models.families import family_of, is_converted, is_encoder, model_options, refuse, set_causal
from gritlm.models.hub import DECODER, base_of, model_folder
from gritlm.models.lora import merge_adapter
from gritlm.models.probe import choose_attention

ATTENTION = {"bb": False, "cc": True}


def load_config(name_or_path: str, attn: str | None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The backbone's config. Loads no weights.

    Args:
        attn: sets `is_causal`: "bb" for bidirectional, "cc" for causal attention. None keeps what config.json says.
    Raises:
        UserError: the model does not exist or is not supported, or `attn` is None and config.json has no `is_causal`.
    """
    path = find_file(name_or_path, "config.json") or Path(name_or_path) / "config.json"
    try:
        folder = str(path.parent) if path.is_file() else model_folder(name_or_path)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        if path.is_file():
            raise unreadable(path, "the config of a model that transformers knows", error) from error
        why = find_adapter(name_or_path)
        if not why and (path.parent.is_dir() or name_or_path.startswith((".", "/", "~"))):
            why = "found no config.json there, wanted a model folder"
        why = why or f"neither a model folder nor a model on the hub: {one_line(error)}"
        raise UserError(f"--model_name_or_path {name_or_path}: {why}") from error
    if why := refuse(config):
        raise UserError(f"--model_name_or_path {name_or_path}: {why}")
    if attn is not None:
        return set_causal(config, ATTENTION[attn])
    if not is_encoder(config.model_type) and not hasattr(config, family_of(config).switch):
        raise UserError(f"{name_or_path}: found no is_causal in its config.json, wanted true or false")
    return config


def load_backbone(
    name_or_path: str,
    config: PreTrainedConfig,
    attn_implementation: str = PACKED,
    reset_weight: bool = False,
    seed: int = 0,
    trust_remote_code: bool = False,
    merge_adapters: bool = True,
) -> PreTrainedModel:
    """The decoder stack without its language-model head, with float32 weights. An adapter is merged into its base.

    Float32 because AdamW at a fine-tuning learning rate rounds most updates of bf16 weights away. Autocast gives bf16.

    Args:
        attn_implementation: the attention kernel, "packed" or one of transformers' names. A family that cannot be
            packed gets another one.
        reset_weight: draw the weights from the model's own initialisation and read none from disk.
        seed: of that initialisation; one seed gives one model, whatever the device and the engine.
        merge_adapters: False loads an adapter's base alone.
    Raises:
        UserError: `check_base` refuses the model, the attention kernel is not available, or weights are missing.
    """
    if attn_implementation == PACKED:
        attn_implementation, _ = choose_attention(config, trust_remote_code)
    options = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    options |= model_options(config)
    check_base(name_or_path, config, trust_remote_code, reset_weight, download=True)
    try:
        if reset_weight or receives_weights():
            return draw_backbone(config, seed, **options)
        if (base := base_of(name_or_path)) != name_or_path:
            backbone = load_backbone(base, config, attn_implementation, trust_remote_code=trust_remote_code)
            if merge_adapters:
                merge_adapter(backbone, model_folder(name_or_path, DECODER))
            return backbone
        backbone, report = AutoModel.from_pretrained(
            model_folder(name_or_path, DECODER),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        why = first_line(error)
        if isinstance(error, ImportError) or "attn_implementation" in why:
            raise UserError(f"--attn_implementation {attn_implementation}: {why}; packed works everywhere") from error
        raise UserError(f"--model_name_or_path {name_or_path}: {why}") from error
    for kind, problem in (("missing_keys", "are missing"), ("unexpected_keys", "are not the backbone's")):
        names = sorted(report[kind])
        # check_base has judged unexpected weights, except where transformers saves weights in another form.
        if names and (kind == "missing_keys" or is_converted(config)):
            raise UserError(f"--model_name_or_path {name_or_path}: {len(names)} weights {problem}, first {names[0]!r}")
    vars(backbone).pop("_weight_conversions", None)  # else it is saved under the names of an older version
    return backbone


def draw_backbone(config: PreTrainedConfig, seed: int, **options: Any) -> PreTrainedModel:
    """The backbone with weights drawn on the CPU. Where the first rank hands its weights out, the others draw none.

    Under ZeRO-3 transformers would draw them on the device and in another order.
    """
    zero3 = is_deepspeed_zero3_enabled()
    set_seed(seed)
    with set_zero3_state(), no_init_weights() if receives_weights() or (zero3 and rank() > 0) else nullcontext():
        backbone = AutoModel.from_config(config, dtype=torch.float32, **options)
    if zero3:
        import deepspeed

        deepspeed.zero.Init(module=backbone, config_dict_or_path=deepspeed_config())
    return backbone


def receives_weights() -> bool:
    """Whether this rank gets all weights from another one when FSDP shards them: its own memory stays untouched."""
    return is_fsdp_enabled() and not is_local_dist_rank_0()
