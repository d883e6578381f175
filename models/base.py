"""What a base says of itself as an embedding model: pooling, attention, projection, prompts, limits. Reads no weight.

A folder of this project says it in text_contract.json. A sentence-transformers folder, such as Qwen3-Embedding's, says
it in modules.json and the files of its modules. A plain language model says next to nothing.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gritlm.errors import UserError
from gritlm.models.base_files import find_file, read_header, read_json, unreadable
from gritlm.models.families import is_encoder
from gritlm.models.hub import knows
from gritlm.models.pooling import POOLING
from gritlm.models.text import CONTRACT_FILE, TextContract

MODULES_FILE = "modules.json"
MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
# sentence-transformers' names of pooling methods, by the key that switches each on.
_POOLING_KEYS = {row.sentence_transformers: name for name, row in POOLING.items()} | {
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
}
_NOT_USED = {
    "sentence_bert_config.json": (
        *("do_lower_case", "model_args", "model_kwargs", "config_args", "config_kwargs"),
        *("tokenizer_args", "processor_kwargs", "processing_kwargs"),
    ),
    "config_sentence_transformers.json": ("default_prompt_name", "truncate_dim"),
}


@dataclass(frozen=True)
class BaseSettings:
    """What a base says of itself; None where it does not say. The first eight fields are the flags of these names.

    Attributes:
        projection_folder: the folder with the weights of its projection.
        projection_bias: whether they have a bias.
        rstrip: its tokenizer drops white space at the end of a text.
        prompts: its instructions by name, without empty ones.
        unusable: flag -> what the base has there that this project has not.
        notes: what else it says, and what this project makes of it.
    """

    attn: str | None = None
    pooling_method: str | None = None
    normalized: bool | None = None
    projection: int | None = None
    pool_instruction: bool | None = None
    append_eos: bool | None = None
    query_max_len: int | None = None
    passage_max_len: int | None = None
    projection_folder: Path | None = None
    projection_bias: bool = True
    rstrip: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_base(name_or_path: str) -> BaseSettings:
    """What a model folder, or a model on the hub, says of itself.

    Raises:
        UserError: a file is damaged, or modules.json names a module that this project has not.
    """
    config_file = find_file(name_or_path, "config.json") if name_or_path else None
    if config_file is None:  # loading the config gives the reason
        return BaseSettings()
    config, modules = read_json(config_file), _read_modules(name_or_path)
    contract = find_file(name_or_path, CONTRACT_FILE)
    if contract and modules is None:
        raise UserError(f"{name_or_path}: found {CONTRACT_FILE} without {MODULES_FILE}, wanted a whole model folder")
    if modules is None:
        return BaseSettings(
            attn=attention_of(config, None),
            append_eos=True if _appends_end_token(name_or_path) else None,
            notes=_notes_on_a_language_model(name_or_path),
        )
    projection = _read_projection(name_or_path, modules, config.get("hidden_size"))
    if contract is None:
        return _read_sentence_transformers(name_or_path, modules, config, projection)
    text = TextContract.load(contract.parent)
    return BaseSettings(
        attn=attention_of(config, "cc"),
        pooling_method=text.pooling_method,
        normalized=text.normalized,
        pool_instruction=text.pool_instruction,
        append_eos=text.append_eos,
        query_max_len=text.query_max_len,
        passage_max_len=text.passage_max_len,
        rstrip=text.rstrip,
        prompts=_not_empty(text.prompts),
        **projection,
    )


def attention_of(config: dict[str, Any], otherwise: str | None) -> str | None:
    """bb or cc by the fields of config.json. Every loader runs a decoder that does not say as causal."""
    if is_encoder(str(config.get("model_type"))):
        return "bb"
    causal = config.get("is_causal")
    if causal is None and config.get("use_bidirectional_attention") is True:  # false is what a plain Gemma 3 saves
        causal = False
    return otherwise if causal is None else "cc" if causal else "bb"


def _appends_end_token(name_or_path: str) -> bool:
    """Whether the tokenizer ends every text with a special token."""
    processor = _read(name_or_path, "tokenizer.json").get("post_processor") or {}
    for step in processor.get("processors", [processor]):  # a sequence of them, or one
        template = step.get("single") if step.get("type") == "TemplateProcessing" else None
        around = step.get("type") in ("BertProcessing", "RobertaProcessing")
        if around or (template and "SpecialToken" in template[-1]):
            return True
    return _read(name_or_path, "tokenizer_config.json").get("add_eos_token") is True


def _notes_on_a_language_model(name_or_path: str) -> tuple[str, ...]:
    if Path(name_or_path).is_dir() or knows(name_or_path, MODULES_FILE):
        return ()  # there is no such file
    return (f"{MODULES_FILE} is not in the cache and the hub does not answer: taken for a plain language model",)


def _read(name_or_path: str, file: str) -> dict[str, Any]:
    """A file's JSON object; empty if the model has no such file."""
    path = find_file(name_or_path, file)
    return read_json(path) if path else {}


def _not_empty(prompts: dict[str, Any]) -> dict[str, str]:
    return {name: prompt for name, prompt in prompts.items() if isinstance(prompt, str) and prompt}


# ---- sentence-transformers


def _read_modules(name_or_path: str) -> list[tuple[str, str]] | None:
    """The class and the folder of each module of modules.json, or None if the model has no such file.

    Raises:
        UserError: the file is damaged, or names a module that this project has not.
    """
    file = find_file(name_or_path, MODULES_FILE)
    if file is None:
        return None
    try:
        listing = json.loads(file.read_text(encoding="utf-8"))
        modules = [(str(module["type"]), str(module["path"])) for module in listing]
        if not modules:
            raise ValueError("no module")
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable(file, "a list of modules, each with type and path", error) from error
    for kind, _ in modules:
        if not kind.startswith("sentence_transformers.") or kind.rpartition(".")[2] not in MODULES:
            raise UserError(
                f"{file}: found the module {kind}, wanted {', '.join(MODULES)}; to train without it, take it out there"
            )
    return [(kind.rpartition(".")[2], path) for kind, path in modules]


def _read_sentence_transformers(
    name: str, modules: list[tuple[str, str]], config: dict[str, Any], projection: dict[str, Any]
) -> BaseSettings:
    folders = dict(modules)
    pooling = _read(name, f"{folders['Pooling']}/config.json") if "Pooling" in folders else {}
    methods = pooling.get("pooling_mode") or [method for key, method in _POOLING_KEYS.items() if pooling.get(key)]
    method = methods if isinstance(methods, str) else "+".join(methods) or "mean"
    files = {file: _read(name, file) for file in _NOT_USED}
    notes = [
        f"{key} {files[file][key]!r} in {file} is not used"
        for file, keys in _NOT_USED.items()
        for key in keys
        if files[file].get(key)
    ]
    texts, served = files.values()
    # The longest text that the model can take at all is no choice.
    limit = texts.get("max_seq_length") or _read(name, "tokenizer_config.json").get("model_max_length")
    limit = limit if limit and limit < config.get("max_position_embeddings", 0) else None
    by_cosine = (served.get("similarity_fn_name") or "cosine") == "cosine"
    if by_cosine and "Normalize" not in folders:
        notes.append("its vectors have no unit norm, but it compares them by cosine: taken as normalized")
    unusable = projection.pop("unusable", {}) | ({} if method in POOLING else {"pooling_method": method})
    return BaseSettings(
        attn=attention_of(config, "cc"),
        pooling_method=method if method in POOLING else None,
        normalized=by_cosine or "Normalize" in folders,
        pool_instruction=bool(pooling.get("include_prompt", True)),
        append_eos=_appends_end_token(name),
        query_max_len=limit,
        passage_max_len=limit,
        prompts=_not_empty(served.get("prompts") or {}),
        unusable=unusable,
        notes=tuple(notes),
        **projection,
    )


def _read_projection(name: str, modules: list[tuple[str, str]], hidden_size: int | None) -> dict[str, Any]:
    """The fields of `BaseSettings` that a Dense module gives."""
    kinds = [kind for kind, _ in modules]
    if "Dense" not in kinds:
        return {}
    folder = dict(modules)["Dense"]
    says = _read(name, f"{folder}/config.json")
    weights = find_file(name, f"{folder}/model.safetensors")
    activation = str(says.get("activation_function", "Tanh")).rpartition(".")[2]
    places = {says.get(key) or "sentence_embedding" for key in ("module_input_name", "module_output_name")}
    width, bias = says.get("out_features"), bool(says.get("bias", True))
    if kinds[:3] != ["Transformer", "Pooling", "Dense"] or kinds.count("Dense") > 1:
        return {"unusable": {"projection": f"the modules {', '.join(kinds)}"}}
    if activation != "Identity" or says.get("use_residual") or places != {"sentence_embedding"}:
        return {"unusable": {"projection": f"{folder}, which is not a linear layer alone ({activation})"}}
    if weights is None:
        return {"unusable": {"projection": f"{folder} without model.safetensors"}}
    found = {key: shape for key, (_, shape) in read_header(weights).items()}
    wanted = {"linear.weight": [width, hidden_size]} | ({"linear.bias": [width]} if bias else {})
    if found != wanted:
        return {"unusable": {"projection": f"{folder} with weights {found} in place of {wanted}"}}
    return {"projection": width, "projection_folder": weights.parent, "projection_bias": bias}
