"""Save and load a model folder, which sentence-transformers and transformers load without extra code.

It holds safetensors with the base model's keys, config.json with `is_causal`, the tokenizer, the text contract, and the
JSON files from which sentence-transformers reads pooling, projection, normalisation and prompts.
"""

import json
import logging
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from gritlm.errors import UserError
from gritlm.files import to_disk, write_json
from gritlm.models.attention import PACKED
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.checks import check_tokenizer
from gritlm.models.embedder import PROJECTION_FOLDER, Embedder
from gritlm.models.hub import DECODER, model_folder
from gritlm.models.pooling import POOLING
from gritlm.models.text import CONTRACT_FILE, TextContract
from gritlm.models.tokenizer import (
    LOADER_OPTIONS,
    TextTokenizer,
    check_saved_tokenizer,
    load_tokenizer,
    save_tokenizer,
)

_MODULE = "sentence_transformers.models."
LOADERS = ("sentence_transformers", "transformers")  # an older sentence-transformers warns of a newer folder


def save_model_folder(
    embedder: Embedder,
    text_tokenizer: TextTokenizer,
    folder: str | Path,
    weights: dict[str, Tensor] | None = None,
    max_shard_size: str = "50GB",
) -> None:
    """Write all files of a model folder but its card. `modules.json` comes last: a folder that has it is complete.

    The first save of a tokenizer is read back as each loader reads it, and compared.

    Args:
        weights: all weights by name. Needed where the embedder's own parameters are only shards.
        max_shard_size: the largest weights file, as transformers reads it.
    Raises:
        UserError: a loader would give other tokens.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    embedder.save_weights(folder, weights, max_shard_size)
    complete_model_folder(embedder, text_tokenizer, folder)


def complete_model_folder(embedder: Embedder, text_tokenizer: TextTokenizer, folder: Path) -> None:
    """Write what a model folder holds beside its weights and its card. They lie there, and config.json too.

    Args:
        embedder: its parameters are not read.
    """
    contract = text_tokenizer.contract
    complete_config(folder / "config.json")
    # safetensors makes files that only their owner can read, and a server runs as another user.
    for path in folder.rglob("*model*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)
    save_tokenizer(text_tokenizer.tokenizer, folder, contract.longest)
    contract.save(folder)
    _check_once(folder, text_tokenizer)
    _write_sentence_transformers_files(embedder, contract, folder)


def _write_sentence_transformers_files(embedder: Embedder, contract: TextContract, folder: Path) -> None:
    """Pooling, projection, normalisation, prompts and limits, as sentence-transformers reads them."""

    def write(name: str, content: object) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        write_json(path, content)

    pooling = {row.sentence_transformers: name == contract.pooling_method for name, row in POOLING.items()}
    pooling |= {"word_embedding_dimension": embedder.config.hidden_size, "include_prompt": contract.pool_instruction}
    write("1_Pooling/config.json", pooling)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if embedder.projection is not None:
        write(
            f"{PROJECTION_FOLDER}/config.json",
            {
                "in_features": embedder.config.hidden_size,
                "out_features": embedder.embedding_dim,
                "bias": True,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
        )
        modules.append((PROJECTION_FOLDER, "Dense"))
    if contract.normalized:
        (folder / "3_Normalize").mkdir(exist_ok=True)
        modules.append(("3_Normalize", "Normalize"))
    # sentence-transformers has one limit for queries and passages.
    write(
        "sentence_bert_config.json",
        {"max_seq_length": contract.longest, "do_lower_case": False, "tokenizer_args": LOADER_OPTIONS},
    )
    write(
        "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {name: version(name.replace("_", "-")) for name in LOADERS},
            "prompts": {"query": "", "document": ""} | contract.prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if contract.normalized else "dot",
        },
    )
    listing = [
        {"idx": index, "name": str(index), "path": path, "type": _MODULE + kind}
        for index, (path, kind) in enumerate(modules)
    ]
    write("modules.json", listing)


def complete_config(path: Path) -> None:
    """Add to config.json what other loaders read, and remove what names code that the folder does not hold.

    transformers 4 and programs built on it read `rope_theta` at the top level. TEI reads `use_bidirectional_attention`.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    rope: dict[str, Any] = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "is_causal" in config:
        config["use_bidirectional_attention"] = not config["is_causal"]
    config.pop("auto_map", None)
    write_json(path, config)


def _check_once(folder: Path, text_tokenizer: TextTokenizer) -> None:
    """Check the saved tokenizer the first time; later saves must have the same bytes."""
    saved = b"".join((folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json"))
    if text_tokenizer.checked != saved:
        for note in check_saved_tokenizer(folder, text_tokenizer):
            logging.getLogger("gritlm").info("saved tokenizer: %s", note)
        text_tokenizer.checked = saved


def load_model_folder(
    folder: str, contract: TextContract | None = None, attn_implementation: str = PACKED
) -> tuple[Embedder, TextTokenizer]:
    """Read what `save_model_folder` wrote, or a bare backbone, which becomes bidirectional.

    Args:
        folder: its path, or its name on the hub.
        contract: for a bare backbone, which has no text contract.
    Returns:
        The embedder in evaluation mode, and its tokenizer.
    Raises:
        UserError: the folder is not a model, or has no contract and none was given.
    """
    path = Path(model_folder(folder, DECODER))
    if (path / CONTRACT_FILE).is_file():
        contract, attn = TextContract.load(path), None
    elif contract is None:
        raise UserError(f"{folder}: found no {CONTRACT_FILE}, wanted a folder made by gritlm train")
    else:
        attn = "bb"
    backbone = load_backbone(folder, load_config(folder, attn), attn_implementation)
    dense = path / PROJECTION_FOLDER / "config.json"
    projection = json.loads(dense.read_text(encoding="utf-8"))["out_features"] if dense.is_file() else None
    embedder = Embedder(backbone, contract, projection)
    embedder.load_projection(path)
    tokenizer = load_tokenizer(folder, contract)
    check_tokenizer(folder, tokenizer, embedder.config)
    return embedder.eval(), TextTokenizer(tokenizer, contract)


def move_model_folder(aside: str | Path, folder: str | Path) -> None:
    """Move the files of a model folder into a folder that holds other files too, `modules.json` last.

    Args:
        aside: a complete model folder on the same disk; it is removed.
        folder: where its files go. Files and folders of the same name are replaced.
    """
    folder, aside = Path(folder), Path(aside)
    for path in aside.rglob("*"):
        to_disk(path)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == "modules.json"):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    aside.rmdir()
    to_disk(folder)
