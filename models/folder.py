"""Save and load a model folder, which sentence-transformers and transformers load without extra code.

It holds safetensors with the base model's keys, config.json with `is_causal`, the tokenizer, the text contract, and the
JSON files from which sentence-transformers reads pooling, projection, normalisation and prompts.
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
from gritlm.models.pooling import POOLING
from gritlm.models.text import CONTRACT_FILE, TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer, save_tokenizer

_MODULE = "sentence_transformers.models."


def save_model_folder(
    embedder: Embedder, text_tokenizer: TextTokenizer, folder: str | Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write all files of a model folder. `modules.json` comes last, so a folder that has it is complete.

    Args:
        weights: all weights by name. Needed where the embedder's own parameters are only shards.
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
    """Read what `save_model_folder` wrote, or a bare backbone, which becomes bidirectional.

    Args:
        contract: for a bare backbone, which has no text contract.
        attn_implementation: the attention kernel.
    Returns:
        The embedder in evaluation mode, and its tokenizer.
    Raises:
        UserError: the folder is not a model, or has no contract and none was given.
    """
    path = Path(folder)
    if (path / CONTRACT_FILE).is_file():
        contract, attn = TextContract.load(path), None
    elif contract is None:
        raise UserError(f"{folder}: found no {CONTRACT_FILE}, wanted a folder made by gritlm train")
    else:
        attn = "bb"
    backbone = load_backbone(folder, load_config(folder, attn), attn_implementation)
    dense = path / PROJECTION_FOLDER / "config.json"
    projection = json.loads(dense.read_text())["out_features"] if dense.is_file() else None
    embedder = Embedder(backbone, contract, projection)
    embedder.load_projection(path)
    return embedder.eval(), TextTokenizer(load_tokenizer(folder, contract), contract)


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
