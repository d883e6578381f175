"""Token ids in, unit vectors out: backbone, pooling, optional projection, normalisation."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from gritlm.models.pooling import pool

PROJECTION_FOLDER = "2_Dense"


class Embedder(nn.Module):
    """A text encoder around a decoder LLM.

    Args:
        backbone: the decoder stack, `config.is_causal` set as wanted.
        pooling_method: mean, weightedmean, lasttoken or cls.
        normalized: divide each vector by its Euclidean norm.
        projection: width of a linear layer (with bias) after pooling, or None.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        pooling_method: str = "mean",
        normalized: bool = True,
        projection: int | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.pooling_method = pooling_method
        self.normalized = normalized
        width = backbone.config.hidden_size
        self.projection = nn.Linear(width, projection, dtype=backbone.dtype) if projection else None

    @property
    def config(self):
        return self.backbone.config

    @property
    def embedding_dim(self) -> int:
        return self.projection.out_features if self.projection else self.config.hidden_size

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pooling_mask: Tensor) -> Tensor:
        """Encode N right-padded texts.

        Args:
            input_ids: int64 (N, L).
            attention_mask: int64 (N, L), 1 where a token stands.
            pooling_mask: bool (N, L), true where a token counts in pooling; at least one per row.
        Returns:
            float32 (N, D), unit norm if `normalized`.
        """
        states_NLD = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        with torch.autocast(states_NLD.device.type, enabled=False):
            vectors_ND = pool(states_NLD, pooling_mask, self.pooling_method)
            if self.projection is not None:
                vectors_ND = self.projection(vectors_ND.to(self.projection.weight.dtype)).float()
            return F.normalize(vectors_ND, dim=-1) if self.normalized else vectors_ND

    def activation_checkpointing_enable(self, **options) -> None:
        """Recompute each layer's activations in the backward pass; called by the Trainer."""
        self.backbone.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options) -> None:
        """The same, under the name that older versions of transformers call."""
        self.backbone.gradient_checkpointing_enable(**options)

    @property
    def _no_split_modules(self) -> list[str]:
        """The backbone's layer classes, under the name by which accelerate looks for what FSDP shards one by one."""
        return self.backbone._no_split_modules

    def save_weights(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write config.json and safetensors with the base model's keys, and the projection beside them.

        `weights` are all the embedder's, by name, where its own parameters are only shards.
        """
        weights = self.state_dict() if weights is None else weights
        parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "projection": {}}
        for name, value in weights.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value.contiguous()
        self.backbone.save_pretrained(folder, state_dict=parts["backbone"])
        if self.projection is not None:
            path = Path(folder) / PROJECTION_FOLDER
            path.mkdir(parents=True, exist_ok=True)
            linear = {f"linear.{name}": value.float() for name, value in parts["projection"].items()}
            save_file(linear, path / "model.safetensors")

    def load_weights(self, folder: str | Path) -> None:
        """Read back what `save_weights` wrote, in place and exactly."""
        saved = AutoModel.from_pretrained(folder, dtype=torch.float32)
        self.backbone.load_state_dict(saved.state_dict())
        if self.projection is not None:
            self.load_projection(folder)

    def load_projection(self, folder: str | Path) -> None:
        """Read the projection's weights only."""
        weights = load_file(Path(folder) / PROJECTION_FOLDER / "model.safetensors")
        self.projection.load_state_dict({name.removeprefix("linear."): value for name, value in weights.items()})
