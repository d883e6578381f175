"""Token ids in, one vector per text out: backbone, pooling, optional projection, normalisation."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gritlm.errors import UserError
from gritlm.models import selective
from gritlm.models.attention import PACKED, Packing
from gritlm.models.families import dropouts, family_of, is_converted, is_encoder, model_options
from gritlm.models.lora import attach, load_adapter, quantise, save_adapter
from gritlm.models.pooling import pool, positions
from gritlm.models.text import TextContract

if TYPE_CHECKING:
    from peft import LoraConfig

PROJECTION_FOLDER = "2_Dense"


class Embedder(nn.Module):
    """An embedding model built on a decoder LLM or an encoder.

    Args:
        backbone: the layers without a head, from `load_backbone`: its config says whether they are causal.
        contract: gives the pooling method and whether vectors are normalised.
        projection: width of a linear layer (with bias) after pooling, or None.
    """

    def __init__(self, backbone: PreTrainedModel, contract: TextContract, projection: int | None = None):
        super().__init__()
        self.backbone, self.contract = backbone, contract
        width = backbone.config.hidden_size
        self.projection = nn.Linear(width, projection, dtype=backbone.dtype) if projection else None
        self.teacher_projection: nn.Linear | None = None
        self.adapter: LoraConfig | None = None
        self.quantised = False

    @property
    def config(self) -> PreTrainedConfig:
        return self.backbone.config

    @property
    def packed(self) -> bool:
        """Whether `forward` accepts packed texts. It always accepts padded ones."""
        return self.config._attn_implementation == PACKED

    def add_adapter(self, config: "LoraConfig", seed: int = 0) -> None:
        """Train an adapter, and the projection, in place of all weights. The saved folder then holds no others."""
        attach(self.backbone, config, seed)
        self.adapter = config

    def quantise(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Store the frozen matrices in 4 bits; `dtype` is that of the products."""
        quantise(self.backbone, device, dtype)
        self.quantised = True

    @property
    def drops_out(self) -> bool:
        """Whether training draws random numbers."""
        of_adapter = self.adapter.lora_dropout if self.adapter is not None else 0.0
        return max(*dropouts(self.config), of_adapter) > 0

    def trained_state(self) -> dict[str, Tensor]:
        """All weights by name; with an adapter those that are trained."""
        if self.adapter is None:
            return self.state_dict()
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def add_teacher_projection(self, width: int) -> None:
        """In training, append to each vector its projection on a teacher's width. The model folder does not hold it."""
        self.teacher_projection = nn.Linear(self.embedding_dim, width, dtype=self.backbone.dtype)

    @property
    def embedding_dim(self) -> int:
        return self.projection.out_features if self.projection else self.config.hidden_size

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        prompt_lengths: Tensor,
        equal_length_runs: tuple[tuple[int, int], ...] = (),
    ) -> Tensor:
        """Encode N texts: packed end to end without padding, or right-padded.

        Args:
            input_ids: int64 (T,) packed, or (N, L) padded.
            lengths: int64 (N,), tokens in each text.
            prompt_lengths: int64 (N,), leading tokens of each text that are not pooled.
            equal_length_runs: packed only: (count, length) of each run of equally long texts, in order.
        Returns:
            float32 (N, D), of unit norm if `contract.normalized`. In training with a teacher projection (N, D + E).
        """
        no_cache = {} if is_encoder(self.config.model_type) else {"use_cache": False}
        if input_ids.dim() == 1:
            ends_N = lengths.cumsum(0)
            states_TD = self.backbone(
                input_ids=input_ids[None],
                position_ids=self._positions(input_ids, lengths)[None],
                attention_mask=torch.ones_like(input_ids)[None],  # else transformers looks for texts in position_ids
                packing=Packing(equal_length_runs, F.pad(ends_N, (1, 0)).int()),
                **no_cache,
            )[0][0]
        else:
            mask_NL = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
            states_NLD = self.backbone(input_ids=input_ids, attention_mask=mask_NL.long(), **no_cache)[0]
            states_TD = states_NLD[mask_NL]
        with torch.autocast(states_TD.device.type, enabled=False):
            vectors_ND = pool(states_TD, lengths, prompt_lengths, self.contract.pooling_method)
            if self.projection is not None:
                vectors_ND = self.projection(vectors_ND.to(self.projection.weight.dtype)).float()
            vectors_ND = F.normalize(vectors_ND, dim=-1) if self.contract.normalized else vectors_ND
            if self.teacher_projection is None or not self.training:
                return vectors_ND
            projected_NE = self.teacher_projection(vectors_ND.to(self.teacher_projection.weight.dtype))
            return torch.cat([vectors_ND, projected_NE.float()], dim=1)

    def _positions(self, ids_T: Tensor, lengths_N: Tensor) -> Tensor:
        """int64 (T,): the position of each token in its text, as the model numbers it in a padded batch."""
        if not family_of(self.config).positions_after_padding:
            return positions(lengths_N, len(ids_T))
        padding, real_T = self.config.pad_token_id, (ids_T != self.config.pad_token_id).long()
        count_T = F.pad(real_T.cumsum(0), (1, 0))
        before_T = count_T[lengths_N.cumsum(0) - lengths_N].repeat_interleave(lengths_N, output_size=len(ids_T))
        return (count_T[1:] - before_T) * real_T + padding

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute each layer's activations in the backward pass. The Trainer calls this."""
        if self.adapter is not None:  # else reentrant checkpointing would see no input that needs a gradient
            self.backbone.enable_input_require_grads()
        self.backbone.activation_checkpointing_enable(**options)

    def keep_products(self) -> None:
        """Recompute in the backward pass only what is cheap, see `gritlm.models.selective`."""
        options = {"use_reentrant": False, "context_fn": selective.contexts}
        self.backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The same, under the name that older versions of transformers call."""
        self.backbone.gradient_checkpointing_enable(**options)

    @property
    def _no_split_modules(self) -> list[str] | set[str] | None:
        """The backbone's layer classes. accelerate reads this name to decide which modules FSDP shards."""
        return self.backbone._no_split_modules

    def save_weights(
        self, folder: str | Path, weights: dict[str, Tensor] | None = None, max_shard_size: str = "50GB"
    ) -> None:
        """Write config.json and safetensors with the base model's keys, and the projection in a subfolder.

        With an adapter, its files take the place of the base model's weights.

        Args:
            weights: what `trained_state` gives. Needed where the module's own parameters are only shards.
        """
        weights = self.trained_state() if weights is None else weights
        parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "projection": {}, "teacher_projection": {}}
        for name, value in weights.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value.contiguous()
        if self.adapter is None:
            self.backbone.save_pretrained(folder, state_dict=parts["backbone"], max_shard_size=max_shard_size)
        else:
            self.config.save_pretrained(folder)
            save_adapter(self.backbone, self.adapter, folder, parts["backbone"], self.quantised)
        if self.projection is not None:
            path = Path(folder) / PROJECTION_FOLDER
            path.mkdir(parents=True, exist_ok=True)
            linear = {f"linear.{name}": value.float() for name, value in parts["projection"].items()}
            save_file(linear, path / "model.safetensors")

    def load_weights(self, folder: str | Path) -> None:
        """Read what `save_weights` wrote into the module's own parameters, exactly.

        Raises:
            UserError: a weight is missing, unexpected, or has another shape.
        """
        if self.adapter is not None:
            load_adapter(self.backbone, folder)
        elif is_converted(self.config):  # the files hold them in another form, which transformers reads
            options = model_options(self.config) | {"config": self.config, "dtype": self.backbone.dtype}
            self.backbone.load_state_dict(type(self.backbone).from_pretrained(folder, **options).state_dict())
        else:
            copy_weights(folder, self.backbone)
        self.load_projection(folder)

    def load_projection(self, folder: str | Path, name: str = PROJECTION_FOLDER, bias: bool = True) -> None:
        """Read the projection's weights only, where there is one.

        Args:
            name: the sub-folder that holds them.
            bias: whether they have a bias. Without one it is set to zero: the same function.
        """
        if self.projection is not None:
            absent = () if bias else ("linear.bias",)
            copy_weights(Path(folder) / name, self.projection, "linear.", absent)
            if not bias:
                nn.init.zeros_(self.projection.bias)


def copy_weights(folder: str | Path, module: nn.Module, prefix: str = "", absent: Collection[str] = ()) -> None:
    """Copy a folder's safetensors (one file or shards) into a module's own weights, one tensor at a time.

    Each tensor is read through a fresh memory map. The pages of a map stay in memory while it is open, so a single map
    would grow to a second copy of all weights.

    Args:
        prefix: what precedes the module's own names in the files.
        absent: names that the files do not have; these weights stay as they are.
    Raises:
        UserError: a weight is missing, unexpected, or has another shape.
    """
    single = Path(folder) / "model.safetensors"
    files = [single] if single.exists() else sorted(Path(folder).glob("model-*-of-*.safetensors"))
    file_of: dict[str, Path] = {}
    found: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, "pt") as reader:
            names = reader.keys()
            file_of |= dict.fromkeys(names, file)
            found |= {name: reader.get_slice(name).get_shape() for name in names}
    own = {prefix + name: value for name, value in module.state_dict().items() if prefix + name not in absent}
    wanted = {name: list(value.shape) for name, value in own.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{folder}: weight {name!r}: found shape {found.get(name)}, wanted shape {wanted.get(name)}"
            )
    for name, file in file_of.items():
        with safe_open(file, "pt") as reader:
            own[name].copy_(reader.get_tensor(name))
