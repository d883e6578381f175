"""What comes out: a folder that sentence-transformers and transformers load as it is. Written and read here.

safetensors with the base model's keys, config.json with `is_causal`, the tokenizer, the text contract, and the small
JSON files that tell sentence-transformers about pooling, projection, normalisation and prompts.
"""

import json
import os
import shutil
from pathlib import Path

from torch import Tensor

from gritlm.errors import UserError
from gritlm.files import to_disk
from gritlm.models.attention import PACKED
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.embedder import PROJECTION_FOLDER, Embedder
from gritlm.models.text import CONTRACT_FILE, TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer, save_tokenizer

_MODULE = "sentence_transformers.models."
_POOLING_KEYS = {
    "mean": "pooling_mode_mean_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
    "cls": "pooling_mode_cls_token",
}


def save_model_folder(
    embedder: Embedder, text_tokenizer: TextTokenizer, folder: str | Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write everything a loader needs; `modules.json` comes last, so a folder that has it is whole.

    `weights` are all the embedder's, by name, where its own parameters are only shards.
    """
    folder, contract = Path(folder), text_tokenizer.contract
    folder.mkdir(parents=True, exist_ok=True)
    embedder.save_weights(folder, weights)
    save_tokenizer(text_tokenizer.tokenizer, folder)
    contract.save(folder)

    def write(name: str, content: object) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    pooling = {key: method == contract.pooling_method for method, key in _POOLING_KEYS.items()}
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
    # One limit for both sides is all that sentence-transformers knows.
    longest = max(contract.query_max_len, contract.passage_max_len)
    write("sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    write(
        "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
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


def load_model_folder(
    folder: str, contract: TextContract | None = None, attn_implementation: str = PACKED
) -> tuple[Embedder, TextTokenizer]:
    """Read what `save_model_folder` wrote. A folder without a contract is a bare backbone: give one.

    Raises:
        UserError: the folder is not a model, or has no contract and none was given.
    """
    path = Path(folder)
    if (path / CONTRACT_FILE).is_file():
        contract = TextContract.load(path)
        config = load_config(folder)
        config.is_causal = json.loads((path / "config.json").read_text())["is_causal"]
    elif contract is None:
        raise UserError(f"{folder}: found no {CONTRACT_FILE}, wanted a folder made by gritlm train")
    else:
        config = load_config(folder)
    backbone = load_backbone(folder, config, attn_implementation)
    dense = path / PROJECTION_FOLDER / "config.json"
    projection = json.loads(dense.read_text())["out_features"] if dense.is_file() else None
    embedder = Embedder(backbone, contract.pooling_method, contract.normalized, projection)
    if projection:
        embedder.load_projection(path)
    return embedder.eval(), TextTokenizer(load_tokenizer(folder, contract), contract)


def move_model_folder(aside: str | Path, folder: str | Path) -> None:
    """Move a model folder written aside into a folder that holds other things too, `modules.json` last."""
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
