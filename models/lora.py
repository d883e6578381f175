"""LoRA (arXiv 2106.09685) and QLoRA (arXiv 2305.14314): attach an adapter to a backbone, save, load and merge it.

The layers are peft's. An adapter folder holds peft's two files, and for QLoRA a third that names the 4-bit type.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from gritlm.errors import UserError, one_line
from gritlm.models.families import meta_model

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUANTISED_BASE = "quantised_base.json"  # beside an adapter that was trained on a 4-bit base
NF4: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}  # QLoRA's: the scales are quantised, too
README = """---
library_name: peft
base_model: {base}
---
An adapter for {base}. Its pooling is in 1_Pooling, its text contract in text_contract.json.

```python
from gritlm import GritLM

model = GritLM("THIS FOLDER")
```

Without gritlm, take the config from here: that of the base may say another attention.

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModel

backbone = AutoModel.from_pretrained({base_text}, config=AutoConfig.from_pretrained("THIS FOLDER"))
backbone = PeftModel.from_pretrained(backbone, "THIS FOLDER")
```
"""
PREFIX = "base_model.model."  # of peft's names in the file


def linear_layers(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """The linear layers of the backbone that a config describes: name -> (out, in). Reads no weight."""
    modules = meta_model(config).named_modules()
    return {name: (m.out_features, m.in_features) for name, m in modules if isinstance(m, nn.Linear)}


def match_targets(config: PreTrainedConfig, wanted: Sequence[str] | None) -> list[str]:
    """The endings of names of linear layers that peft gets. None: those of all linear layers of the backbone.

    Raises:
        UserError: one matches no linear layer.
    """
    layers = linear_layers(config)
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    for ending in wanted or ():
        if not any(f".{name}".endswith(f".{ending}") for name in layers):
            raise UserError(
                f"--lora_target_modules: found {ending!r}, wanted names of linear layers, or their endings: "
                f"{', '.join(kinds)}"
            )
    return sorted(set(wanted or kinds))


def adapter_shapes(config: PreTrainedConfig, adapter: "LoraConfig") -> dict[str, list[int]]:
    """The shape of each tensor of an adapter, by name. Reads no weight."""
    backbone = meta_model(config)
    with torch.device("meta"):
        attach(backbone, copy.deepcopy(adapter))
    return {name: list(p.shape) for name, p in backbone.named_parameters() if p.requires_grad}


def make_config(r: int, alpha: float, dropout: float, endings: Sequence[str], base: str | None = None) -> "LoraConfig":
    """peft's settings of a plain LoRA adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=[*endings], base_model_name_or_path=base
    )


def attach(backbone: nn.Module, config: "LoraConfig", seed: int = 0) -> None:
    """Add an adapter that changes nothing yet, and freeze all other weights. One seed gives one adapter."""
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, backbone)


def merge(backbone: nn.Module) -> None:
    """Add the adapter to the weights, and leave the plain architecture, all of it trainable."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import gather_params_ctx

    for name, module in list(backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            with gather_params_ctx(layer.weight):  # ZeRO-3 holds shards
                module.merge()
            _replace(backbone, name, layer)
    del backbone.peft_config
    backbone.requires_grad_(True)


def _replace(backbone: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(backbone.get_submodule(parent), attribute, module)


# ---- files


def read_adapter_config(folder: str | Path) -> "LoraConfig":
    """The settings of an adapter folder.

    Raises:
        UserError: they cannot be read, or the adapter is more than LoRA on linear layers.
    """
    from peft import PeftConfig

    path = Path(folder) / ADAPTER_CONFIG
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{path}: found settings that peft cannot read ({one_line(error)})") from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    extra = next((name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name, None)), "")
    if kind != "LORA" or extra:
        raise UserError(
            f"{path}: found {extra or f'an adapter of the type {kind}'}, wanted LoRA alone: merge it into its base "
            "and save that (merge_and_unload of peft)"
        )
    return config


def save_adapter(
    backbone: nn.Module, config: "LoraConfig", folder: str | Path, weights: Mapping[str, Tensor], quantised: bool
) -> None:
    """Write an adapter as peft does.

    Args:
        weights: at least the adapter's, by the backbone's names.
        quantised: the base has 4-bit weights.
    """
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(backbone, state_dict=dict(weights), save_embedding_layers=False)
    save_file({PREFIX + n: value.contiguous() for n, value in found.items()}, Path(folder) / ADAPTER_WEIGHTS)
    settings = config.to_dict() | {"inference_mode": True}
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    files = {ADAPTER_CONFIG: settings} | ({QUANTISED_BASE: NF4} if quantised else {})
    texts = {name: json.dumps(content, indent=2, sort_keys=True) + "\n" for name, content in files.items()}
    base = config.base_model_name_or_path
    for name, text in (texts | {"README.md": README.format(base=base, base_text=repr(base))}).items():
        (Path(folder) / name).write_text(text, encoding="utf-8")


def load_adapter(backbone: nn.Module, folder: str | Path) -> None:
    """Read the weights of the adapter that is attached.

    Raises:
        UserError: the file is damaged, or holds other tensors than the adapter has.
    """
    from peft import set_peft_model_state_dict

    path = Path(folder) / ADAPTER_WEIGHTS
    try:
        # Of a language model, the backbone is its part "model".
        found = {name.removeprefix(PREFIX).removeprefix("model."): value for name, value in load_file(path).items()}
        result = set_peft_model_state_dict(backbone, found)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: found a file that does not fit the base ({one_line(error)})") from error
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if missing or result.unexpected_keys:
        what = f"found no {missing[0]!r}" if missing else f"found {result.unexpected_keys[0]!r}"
        raise UserError(f"{path}: {what}, wanted the tensors of {ADAPTER_CONFIG} on this base")


def merge_adapter(backbone: nn.Module, folder: str | Path) -> None:
    """Merge an adapter folder into a backbone. A base that was 4-bit in its training has the same values as then."""
    attach(backbone, read_adapter_config(folder))
    load_adapter(backbone, folder)
    if (Path(folder) / QUANTISED_BASE).is_file():
        device = next(backbone.parameters()).device
        quantise(backbone, device, torch.float32)
        dequantise(backbone)
    merge(backbone)


# ---- 4-bit weights


def quantise(backbone: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Store the weights of all linear layers but the adapter's as NF4 on a device; `dtype` is that of the products."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(backbone.named_modules()):
        if type(module) is nn.Linear and ".lora_" not in name:
            sizes = module.in_features, module.out_features, module.bias is not None
            layer = Linear4bit(*sizes, compute_dtype=dtype, device="meta", **NF4)
            layer.support_avx512bf16_for_cpu = False  # it would round the scales to bfloat16, for good
            layer.weight = Params4bit(module.weight.data, requires_grad=False, **NF4)
            layer.bias = module.bias
            _replace(backbone, name, layer.to(device))


def quantised_bytes(weights: int) -> int:
    """Bytes of a matrix of so many weights in NF4: half a byte each, a scale for 64, a scale of scales for 256."""
    blocks = -(-weights // 64)
    return -(-weights // 2) + blocks + 4 * -(-blocks // 256)


def dequantise(backbone: nn.Module) -> None:
    """Make each 4-bit layer a plain one with the same values, in float32."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, module in list(backbone.named_modules()):
        if isinstance(module, Linear4bit):
            layer = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            layer.weight, layer.bias = nn.Parameter(weight.float(), requires_grad=False), module.bias
            _replace(backbone, name, layer)
