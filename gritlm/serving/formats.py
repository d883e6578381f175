"""The forms in which an export writes a model: the model folder, ONNX, GGUF."""

import json
import logging
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import nn
from transformers import AutoModel

from gritlm.errors import UserError, one_line
from gritlm.models.embedder import Embedder
from gritlm.models.folder import save_model_folder
from gritlm.report.card import CardFacts
from gritlm.serving.consumers import ONNX_FILE
from gritlm.serving.parity import ALL, Row
from gritlm.serving.probes import TrainedModel

GGUF_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
CONVERTER = "convert_hf_to_gguf.py"


@dataclass(frozen=True)
class ExportOptions:
    """What is written beside the plain folder, where it is proved, and what its card says."""

    dtype: str = "float32"  # of the weights; the projection stays in float32
    max_shard_size: str = "50GB"  # the largest weights file
    truncate_dim: int | None = None  # keep that many leading dimensions; None keeps all
    onnx: bool = False  # write the backbone to onnx/model.onnx, in float32
    gguf: bool = False  # write a GGUF file with the converter in `llama_cpp`
    llama_cpp: Path | None = None  # a checkout of llama.cpp
    push_to_hub: str | None = None  # the name by which the card's code loads the model; None is its folder
    device: str | None = None  # where the programs run; None is CUDA where there is one, else the CPU
    card: CardFacts = field(default_factory=CardFacts)  # licence, languages, data sets and results


def write_model(trained: TrainedModel, folder: Path, options: ExportOptions) -> None:
    """Change the model in place as the options say, and save it."""
    embedder, width = trained.embedder.cpu(), options.truncate_dim
    if width is not None:
        truncate(embedder, width)
    for weight in embedder.backbone.parameters():
        weight.data = weight.data.to(trained.rounded_to)
    save_model_folder(embedder, trained.text_tokenizer, folder, max_shard_size=options.max_shard_size)


@torch.no_grad()
def truncate(embedder: Embedder, width: int) -> None:
    """Keep the leading dimensions, by a projection to them: a part of the folder that every program reads.

    sentence-transformers would cut by an argument of its user, who has to know it, and does not normalise again.
    """
    hidden = embedder.config.hidden_size
    before, embedder.projection = embedder.projection, nn.Linear(hidden, width)
    embedder.projection.weight.copy_(before.weight[:width] if before else torch.eye(width, hidden))
    embedder.projection.bias.copy_(before.bias[:width] if before else torch.zeros(width))
    if widths := getattr(embedder.config, "matryoshka_dimensions", None):
        embedder.config.matryoshka_dimensions = [other for other in widths if other <= width]


def write_onnx(folder: Path) -> None:
    """Write the backbone: input_ids and attention_mask (N, L) to last_hidden_state (N, L, D), in float32."""
    states = States(AutoModel.from_pretrained(folder, dtype=torch.float32)).eval()
    ids = torch.ones(2, 7, dtype=torch.long)
    axes = {0: "texts", 1: "tokens"}
    path = folder / ONNX_FILE
    path.parent.mkdir()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(
                states,
                (ids, torch.ones_like(ids)),
                path,
                input_names=["input_ids", "attention_mask"],
                output_names=["last_hidden_state"],
                dynamic_shapes=(axes, axes),
                verbose=False,
            )
    except Exception as error:  # of the exporter, onnx or the disk
        raise UserError(f"--onnx: torch.onnx.export failed: {type(error).__name__}: {one_line(error)[:300]}") from error


class States(nn.Module):
    """A backbone of which only the last hidden states are asked."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def write_gguf(folder: Path, name: str, options: ExportOptions) -> Row:
    """Run llama.cpp's converter. Its row says what llama.cpp does not take from a folder."""
    kind = GGUF_TYPES[options.dtype]
    file = folder / f"{name}-{kind}.gguf"
    script = str((options.llama_cpp or Path()) / CONVERTER)
    # What the converter would read from the folder's name, which is not its final one; null is no entry.
    names: dict[str, str | None] = {"general.name": name, "general.basename": name}
    names |= dict.fromkeys((f"general.{key}" for key in ("finetune", "version", "organization")), None)
    with NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as metadata:
        json.dump(names, metadata)
        metadata.flush()
        command = [sys.executable, script, str(folder), "--outfile", str(file), "--outtype", kind]
        command += ["--model-name", name, "--metadata", metadata.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not file.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "it wrote no file").splitlines()[-1]
        raise UserError(f"--gguf: {script} failed: {said}")
    return Row("llama.cpp", ALL, "not run: it pools the prompt, keeps white space at the end, and cuts nothing")
