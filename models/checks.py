"""What is wrong with a base model, from its JSON files and the headers of its safetensors. Reads no weight.

A check is one function and one row of a table. It returns what it found and what was wanted, or "". The files of a
model on the hub are not checked before they are in the local cache, unless `download` is set.
"""

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gritlm.errors import UserError, one_line
from gritlm.models.base_files import INDEX, WEIGHTS, Base, find_file, read_json, refuse_lfs_pointer, unreadable
from gritlm.models.hub import base_of, model_folder

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".gguf", ".onnx", ".h5", ".msgpack")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
FLOATS = ("F64", "F32", "F16", "BF16")
ROPE_TYPES = ("default", "linear", "yarn", "llama3")  # those with the same frequencies in every batch


# ---- the model


def adapter(base: Base) -> str:
    return find_adapter(base.name)


def quantisation(base: Base) -> str:
    for key in ("quantization_config", "compression_config"):
        if settings := getattr(base.config, key, None):
            method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else settings
            return f"found {key} ({method}) in config.json, wanted a model that is not quantised"
    return ""


def rope_type(base: Base) -> str:
    rope = getattr(base.config, "rope_parameters", None) or {}
    for settings in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # one, or of each kind
        if (found := settings.get("rope_type", "default")) not in ROPE_TYPES:
            return (
                f"found rope_type {found!r} in config.json, wanted one of {', '.join(ROPE_TYPES)}: any other is "
                "unknown, or makes a text's vector depend on the texts beside it"
            )
    return ""


def pad_token_id(base: Base) -> str:
    found, rows = base.config.pad_token_id, base.config.vocab_size
    if found is None or 0 <= found < rows:
        return ""
    return f"found pad_token_id {found} in config.json, wanted null or an id below its vocab_size {rows}"


def buildable(base: Base) -> str:
    try:
        base.expected  # noqa: B018
    except Exception as error:  # any, since it depends on the values in the file
        return f"found a config.json that no model can be built from ({type(error).__name__}: {one_line(error)})"
    return ""


# ---- its weights


def weights_exist(base: Base) -> str:
    if base.reset_weight or base.weight_files or not base.all_here:
        return ""
    folder = Path(base.name)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_WEIGHTS) if folder.is_dir() else []
    pickled = any(name.startswith("pytorch_model") for name in others)
    hint = "; AutoModel.from_pretrained(OLD).save_pretrained(NEW) converts them" if pickled else ""
    return f"found {', '.join(others) or 'no weights'}, wanted {WEIGHTS}, or {INDEX} and its shards{hint}"


def layer_count(base: Base) -> str:
    found = len({match[1] for name in base.tensors if (match := re.match(r"(?:encoder\.)?layers?\.(\d+)\.", name))})
    wanted = base.config.num_hidden_layers
    if found in (0, wanted):
        return ""
    return f"found {found} layers in the weights, wanted {wanted} (num_hidden_layers in config.json)"


def missing_weights(base: Base) -> str:
    missing = [name for name in base.expected if name not in base.tensors]
    if not missing:
        return ""
    instead = f"; found {base.unread[0]!r}, which config.json leaves out" if base.unread else ""
    return f"{len(missing)} weights are missing, first {missing[0]!r}{instead}"


def dtypes(base: Base) -> str:
    for name in base.expected:
        if (dtype := base.tensors[name][0]) not in FLOATS:
            return f"found weight {name!r} in {dtype}, wanted {', '.join(FLOATS)}: a model that is not quantised"
    return ""


def shapes(base: Base) -> str:
    different = [name for name, shape in base.expected.items() if base.tensors[name][1] != shape]
    if not different:
        return ""
    name = different[0]
    found, wanted = base.tensors[name][1], base.expected[name]
    fields = {field: getattr(base.config, field) for field in ("vocab_size", "hidden_size", "intermediate_size")}
    named = "".join(f", {field} {size}" for field, size in fields.items() if size in wanted and size not in found)
    more = f"; {len(different) - 1} more differ" if len(different) > 1 else ""
    return f"found weight {name!r} of shape {found}, wanted {wanted} (config.json{named}){more}"


def unread_weights(base: Base) -> str:
    unread = [name for name in base.unread if base.in_backbone(name)]
    if not unread:
        return ""
    bias = getattr(base.config, "attention_bias", None)
    field = f" (attention_bias {bias})" if bias is not None and "self_attn" in unread[0] else ""
    return f"found {len(unread)} weights that config.json leaves out{field}, first {unread[0]!r}, wanted none"


# ---- what the base has and a run does not use


def unused_code(base: Base) -> str:
    files = [path for file in ("config.json", "tokenizer_config.json") if (path := base.path(file))]
    named = [path.name for path in files if read_json(path).get("auto_map")]
    if not named:
        return ""
    used = (
        "the run uses it, but the saved folder will not hold it"
        if base.trust_remote_code
        else "transformers' own classes are used instead; --trust_remote_code True would use it"
    )
    return f"the base brings its own code (auto_map in {' and '.join(named)}): {used}"


def weights_to_come(base: Base) -> str:
    if base.reset_weight or base.weight_files or base.all_here:
        return ""
    return "its weights are not in the cache of the hub: a run downloads them"


def unused_weights(base: Base) -> str:
    unused = [name for name in base.unread if not base.in_backbone(name)]
    more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
    return f"weights outside the backbone are not used: {unused[0]!r}{more}" if unused else ""


Check = Callable[[Base], str]
MODEL: tuple[Check, ...] = (adapter, quantisation, rope_type, pad_token_id, buildable, weights_exist)
SAVED_WEIGHTS: tuple[Check, ...] = (layer_count, missing_weights, dtypes, shapes, unread_weights)
UNUSED: tuple[Check, ...] = (weights_to_come, unused_code, unused_weights)


def check_base(
    name_or_path: str,
    config: PreTrainedConfig,
    trust_remote_code: bool = False,
    reset_weight: bool = False,
    download: bool = False,
) -> list[str]:
    """Check a base model before it is loaded.

    Args:
        reset_weight: the weights will not be read, so they are not checked.
        download: fetch the weights of a model on the hub first.
    Returns:
        A line for each thing that the base has and a run does not use, and one for weights to be downloaded.
    Raises:
        UserError: the model is damaged, incomplete or of an unsupported kind, or its weights do not fit its config.
    """
    base = Base(name_or_path, config, trust_remote_code, reset_weight, download)

    def refuse(checks: tuple[Check, ...]) -> None:
        for check in checks:
            if message := check(base):
                raise UserError(f"--model_name_or_path {name_or_path}: {message}")

    refuse(MODEL)
    if base.tensors and base.expected:
        refuse(SAVED_WEIGHTS)
    return [line for check in UNUSED if (line := check(base))]


def find_adapter(name_or_path: str) -> str:
    """What is wrong with an adapter that cannot be merged, or that lies beside whole weights."""
    folder = Path(model_folder(name_or_path))
    found = [file for file in ADAPTER_FILES if (folder / file).is_file()]
    if not found:
        return ""
    if base_of(name_or_path) == name_or_path:
        return f"found {found[0]} without a base, or beside whole weights, wanted one or the other; move one away"
    if "adapter_model.bin" in found:
        return "found adapter_model.bin, wanted adapter_model.safetensors: save the adapter again with peft"
    return ""


# ---- the tokenizer


def check_tokenizer_files(name_or_path: str) -> None:
    """Check a tokenizer's files before it is loaded.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    fast = find_file(name_or_path, "tokenizer.json")
    paths = [fast] if fast else [find_file(name_or_path, file) for file in ("vocab.json", "merges.txt")]
    if None in paths and Path(name_or_path).is_dir():
        raise UserError(
            f"--model_name_or_path {name_or_path}: found no tokenizer.json, wanted a model with its tokenizer: "
            "AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER) adds it"
        )
    paths += [find_file(name_or_path, file) for file in ("tokenizer_config.json", "special_tokens_map.json")]
    for path in filter(None, paths):
        if path == fast:
            try:
                Tokenizer.from_file(str(path))
            except Exception as error:  # tokenizers raises no other class
                raise unreadable(path, f"a tokenizer that tokenizers {version('tokenizers')} knows", error) from error
        elif path.suffix == ".json":
            read_json(path)
        else:
            refuse_lfs_pointer(path)


def check_tokenizer(name_or_path: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Check that a tokenizer gives tokens, and that the model has an embedding for each.

    Raises:
        UserError: it gives none, or an id has no row in the embedding.
    """
    if not tokenizer("a", add_special_tokens=False).input_ids:
        raise UserError(f"--model_name_or_path {name_or_path}: found a tokenizer without tokens, wanted the model's")
    rows = config.vocab_size
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if beyond:
        pad = tokenizer.pad_token
        token = pad if pad in beyond else min(beyond, key=beyond.__getitem__)
        raise UserError(
            f"--model_name_or_path {name_or_path}: found {len(beyond)} tokens that have no row in the embedding, "
            f"{'with the pad token' if token == pad else 'first'} {token!r} (id {beyond[token]}), "
            f"wanted ids below {rows} (vocab_size in config.json)"
        )
