"""Token ids in, unit vectors out: backbone, pooling, optional projection, normalisation."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from gritlm.models.attention import PACKED, Packing
from gritlm.models.pooling import pool, positions

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
    def packed(self) -> bool:
        """Whether it takes packed texts; padded ones it takes always."""
        return self.config._attn_implementation == PACKED

    @property
    def embedding_dim(self) -> int:
        return self.projection.out_features if self.projection else self.config.hidden_size

    def forward(
        self, input_ids: Tensor, lengths: Tensor, prompt_lengths: Tensor, equal_length_runs: tuple = ()
    ) -> Tensor:
        """Encode N texts, packed one after the other without padding, or right-padded.

        Args:
            input_ids: int64 (T,) packed, or (N, L) padded.
            lengths: int64 (N,), tokens of each text.
            prompt_lengths: int64 (N,), how many of each text's first tokens do not count in pooling.
            equal_length_runs: packed only: (count, length) of each run of equally long texts, in order.
        Returns:
            float32 (N, D), unit norm if `normalized`.
        """
        if input_ids.dim() == 1:
            ends_N = lengths.cumsum(0)
            packing = Packing(equal_length_runs, F.pad(ends_N, (1, 0)).int())
            states_TD = self.backbone(
                input_ids=input_ids[None],
                position_ids=positions(lengths, len(input_ids))[None],
                attention_mask={"full_attention": None},  # so that transformers makes none
                use_cache=False,
                packing=packing,
            )[0][0]
        else:
            mask_NL = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
            states_NLD = self.backbone(input_ids=input_ids, attention_mask=mask_NL.long(), use_cache=False)[0]
            states_TD = states_NLD[mask_NL]
        with torch.autocast(states_TD.device.type, enabled=False):
            vectors_ND = pool(states_TD, lengths, prompt_lengths, self.pooling_method)
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
