"""The programs that load a model folder, each as its user calls it. All encode the same probe texts."""

import importlib.util
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel

from gritlm.gritlm import GritLM
from gritlm.models.text import TextContract
from gritlm.report.usage import usage

ONNX_FILE = "onnx/model.onnx"
Encode = Callable[[str, list[str]], Any]  # a side ("query", "document", "" without a prompt), texts -> vectors
States = Callable[[dict[str, Tensor]], Tensor]  # input_ids and attention_mask -> last hidden states


class Consumer(NamedTuple):
    """A row of `CONSUMERS`."""

    load: Callable[[Path, str, torch.dtype | None], Encode]  # folder, device, dtype to compute in or None: its own
    own_text_rules: bool = False  # it reads text_contract.json: a limit for each side, a vector for an empty text
    package: str = ""  # what has to be installed, beyond what this project needs anyway
    file: str = ""  # what the folder has to hold, beyond what every folder holds

    def why_not(self, folder: Path) -> str:
        """Why it cannot be run on a folder; "" if it can."""
        if self.file and not (folder / self.file).exists():
            return f"not run: the folder has no {self.file}"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"not run: {self.package} is not installed"
        return ""


def load_gritlm(folder: Path, device: str, dtype: torch.dtype | None) -> Encode:
    model = GritLM(folder, device=device, dtype=torch.float32)  # its own choice depends on the device
    calls: dict[str, Callable] = {"query": model.encode_queries, "document": model.encode_corpus, "": model.encode}
    return lambda side, texts: calls[side](texts, convert_to_tensor=True)


def load_sentence_transformers(folder: Path, device: str, dtype: torch.dtype | None) -> Encode:
    options = {"dtype": dtype} if dtype else {}
    model = SentenceTransformer(str(folder), device=device, local_files_only=True, model_kwargs=options)
    calls: dict[str, Callable] = {"query": model.encode_query, "document": model.encode_document, "": model.encode}
    return lambda side, texts: calls[side](texts, batch_size=8, convert_to_tensor=True).float().cpu()


def load_transformers(folder: Path, device: str, dtype: torch.dtype | None) -> Encode:
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=dtype or "auto").eval().to(device)

    def states_of(batch: dict[str, Tensor]) -> Tensor:
        return model(**{name: ids.to(device) for name, ids in batch.items()}).last_hidden_state.cpu()

    return by_card_code(folder, states_of)


def load_onnxruntime(folder: Path, device: str, dtype: torch.dtype | None) -> Encode:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    return by_card_code(
        folder, lambda batch: torch.from_numpy(session.run(None, {k: np.asarray(v) for k, v in batch.items()})[0])
    )


CONSUMERS = {
    "GritLM": Consumer(load_gritlm, own_text_rules=True),
    "sentence-transformers": Consumer(load_sentence_transformers),
    "transformers": Consumer(load_transformers),
    "ONNX Runtime": Consumer(load_onnxruntime, package="onnxruntime", file=ONNX_FILE),
}


def by_card_code(folder: Path, states_of: States) -> Encode:
    """The function `encode` of the card's code for transformers, around another way to the last hidden states."""
    contract = TextContract.load(folder)
    names: dict[str, Any] = {}
    code = usage(folder, ".")["transformers"].partition("\nqueries = ")[0]
    with chdir(folder):
        exec("\n".join(line for line in code.splitlines() if not line.startswith("model = ")), names)
    names["model"] = lambda **batch: SimpleNamespace(last_hidden_state=states_of(batch))
    prompts = contract.prompts | {"": ""}
    return lambda side, texts: names["encode"](texts, prompts.get(side, ""), contract.longest)
