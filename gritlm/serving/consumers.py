"""The programs that load a model folder, each as its user calls it. All encode the same probe texts."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from gritlm.gritlm import GritLM
from gritlm.models.pooling import POOLING

ONNX_FILE = "onnx/model.onnx"
Encode = Callable[[str, list[str]], Any]  # a side ("query", "document", "" without a prompt), texts -> vectors
States = Callable[[dict[str, Tensor]], Tensor]  # input_ids and attention_mask -> last hidden states


class Consumer(NamedTuple):
    """A row of `CONSUMERS`.

    load: the model folder, a device, and the dtype to compute in (None is the program's own choice) -> `Encode`.
    own_text_rules: it reads text_contract.json: a limit for each side, and a vector for an empty text.
    package: what has to be installed; "" for what this project needs anyway.
    file: what the folder has to hold; "" for what every folder holds.
    """

    load: Callable[[Path, str, torch.dtype | None], Encode]
    own_text_rules: bool = False
    package: str = ""
    file: str = ""

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
    return by_hand(folder, lambda batch: model(**{k: v.to(device) for k, v in batch.items()}).last_hidden_state.cpu())


def load_onnxruntime(folder: Path, device: str, dtype: torch.dtype | None) -> Encode:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    return by_hand(
        folder, lambda batch: torch.from_numpy(session.run(None, {k: np.asarray(v) for k, v in batch.items()})[0])
    )


CONSUMERS = {
    "GritLM": Consumer(load_gritlm, own_text_rules=True),
    "sentence-transformers": Consumer(load_sentence_transformers),
    "transformers": Consumer(load_transformers),
    "ONNX Runtime": Consumer(load_onnxruntime, package="onnxruntime", file=ONNX_FILE),
}


def by_hand(folder: Path, states_of: States) -> Encode:
    """Tokenise, pool, project and normalise by the folder's own files, as code around a bare backbone does."""

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    pooling, prompts = read("1_Pooling/config.json"), read("config_sentence_transformers.json")["prompts"]
    method = next(name for name, row in POOLING.items() if pooling[row.sentence_transformers])
    modules = {module["type"].rpartition(".")[2]: module["path"] for module in read("modules.json")}
    dense = load_file(folder / modules["Dense"] / "model.safetensors") if "Dense" in modules else {}
    options = read("sentence_bert_config.json")["tokenizer_args"]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)

    @torch.no_grad()
    def encode(side: str, texts: list[str]) -> Tensor:
        prompt = prompts[side] if side else ""
        batch = tokenizer([prompt + text for text in texts], padding=True, truncation=True, return_tensors="pt")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        states_NLD, mask_NL = states_of(inputs).float(), inputs["attention_mask"].float()
        first = 0
        if prompt and not pooling["include_prompt"]:
            ids = tokenizer(prompt).input_ids
            first = len(ids) - (ids[-1] in tokenizer.all_special_ids)
        rows, length = torch.arange(len(texts)), mask_NL.shape[1]
        if method == "lasttoken":
            vectors_ND = states_NLD[rows, mask_NL.sum(1).long() - 1]
        elif method == "cls":
            vectors_ND = states_NLD[rows, first]
        else:
            weights_NL = mask_NL * (torch.arange(length) >= first)
            if method == "weightedmean":
                weights_NL = weights_NL * torch.arange(1, length + 1)
            vectors_ND = (states_NLD * weights_NL[..., None]).sum(1) / weights_NL.sum(1, keepdim=True)
        if dense:
            vectors_ND = F.linear(vectors_ND, dense["linear.weight"], dense["linear.bias"])
        return F.normalize(vectors_ND, dim=1) if "Normalize" in modules else vectors_ND

    return encode
