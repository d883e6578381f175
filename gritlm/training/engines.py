"""Engines: how the two-pass step talks to the model's wrapper, so that the gradient is exact on each.

One class for each: plain, replicas (DDP), FSDP2 (`fully_shard`), DeepSpeed ZeRO-1/2/3. The last two average the
gradient over ranks. The step needs the sum, so it multiplies its loss by `loss_scale`.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate.utils import enable_fsdp_ram_efficient_loading
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments

from gritlm.distributed import all_reduce_in_place, all_reduce_max, broadcast_in_place, rank, world_size

Surrogate = Callable[[], Tensor]  # runs one chunk's forward and returns the scalar to back-propagate


class Engine:
    """Interface to the model's wrapper. The base class is the single-process case.

    Attributes:
        model: encodes a chunk in pass 1.
        wrapped: encodes a chunk in pass 2.
        loss_scale: factor on the local loss that turns the engine's average over ranks into the sum.
        collective: whether the other ranks take part in the forward or backward that runs now.
        keeps_graphs: whether a chunk's graph may live from pass 1 to pass 2.
        gradient_shards: in how many parts the gradient is held while further chunks are back-propagated.
    """

    loss_scale = 1.0
    collective = False
    keeps_graphs = True
    gradient_shards = 1
    model: nn.Module
    wrapped: Any

    def __init__(self, model: nn.Module):
        self.model = self.wrapped = model

    def rounds(self, chunks: int) -> int:
        """How many chunks this rank must run. Where a forward is collective, all ranks run the largest number."""
        return chunks

    def agree(self, keep: bool) -> bool:
        """Whether a chunk's graph is kept. Where a forward is collective, only if all ranks can keep theirs."""
        return keep

    def backward(self, surrogates: Sequence[Surrogate]) -> None:
        """Run and back-propagate each. Gradients cross ranks once, with the last."""
        for surrogate in surrogates:
            surrogate().backward()

    def step(self) -> None:
        """Take the optimizer's step, where the engine must do so itself."""


class Replica(nn.Module):
    """A whole model on each rank, with the first rank's weights, for `DDPEngine`.

    torch's DistributedDataParallel would hold each gradient twice: in `.grad`, and in its buckets.

    Args:
        bucket_mb: gradients smaller than this cross the ranks together.
    """

    def __init__(self, module: nn.Module, bucket_mb: int = 25):
        super().__init__()
        self.module, self.bucket_bytes = module, bucket_mb << 20
        for tensor in (*module.parameters(), *module.buffers()):
            broadcast_in_place(tensor.detach())

    def forward(self, **chunk: Any) -> Any:
        return self.module(**chunk)


class DDPEngine(Engine):
    """Distributed data parallel: each rank adds up the gradient of its chunks in `.grad`, then the ranks sum them."""

    def __init__(self, wrapped: Replica):
        self.model, self.wrapped = wrapped.module, wrapped

    def backward(self, surrogates: Sequence[Surrogate]) -> None:
        super().backward(surrogates)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        somewhere = all_reduce_max(*(parameter.grad is not None for parameter in trained))
        gradients = []
        for parameter, is_reached in zip(trained, somewhere, strict=True):
            if is_reached:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
                gradients.append(parameter.grad)
        all_reduce_in_place(gradients, self.wrapped.bucket_bytes)


class ShardedEngine(Engine):
    """Weights or optimizer state in shards.

    Attributes:
        sync_each_chunk: the gradient is summed into shards after each chunk, so that no rank holds the whole one.
        gathers: each chunk has the ranks exchange weights or gradients, so all run and keep the same numbers of chunks.
    """

    collective = True
    gathers = True

    def __init__(self, wrapped: nn.Module, sync_each_chunk: bool = False):
        super().__init__(wrapped)
        self.loss_scale = float(world_size())
        self.sync_each_chunk = sync_each_chunk
        self.gradient_shards = world_size() if sync_each_chunk else 1

    def rounds(self, chunks: int) -> int:
        return all_reduce_max(chunks)[0] if self.gathers else chunks

    def agree(self, keep: bool) -> bool:
        return not all_reduce_max(not keep)[0] if self.gathers else keep


class FSDP2Engine(ShardedEngine):
    """FSDP2: gradients stay whole until the last chunk, unless `sync_each_chunk`.

    A kept graph refers to the storages of the gathered weights. FSDP2 empties them after a layer's forward, and fills
    the same ones again before its backward.
    """

    def backward(self, surrogates: Sequence[Surrogate]) -> None:
        for number, surrogate in enumerate(surrogates, start=1):
            self.wrapped.set_requires_gradient_sync(self.sync_each_chunk or number == len(surrogates))
            self.wrapped.set_is_last_backward(number == len(surrogates))  # else it forgets what to gather in advance
            surrogate().backward()


class DeepSpeedEngine(ShardedEngine):
    """DeepSpeed ZeRO-1, 2 or 3: gradients stay whole until all chunks are done, then one reduction, then its step.

    ZeRO-2 and 3 can sum them after each chunk.

    ZeRO-3 keeps no graphs. It gathers weights into a new tensor for each use, so a kept graph would hold all of them.
    """

    def __init__(self, wrapped: Any, sync_each_chunk: bool = False):
        super().__init__(wrapped, sync_each_chunk)
        gathers_weights = wrapped.zero_optimization_partition_weights()
        self.gathers, self.keeps_graphs = gathers_weights or sync_each_chunk, not gathers_weights

    def backward(self, surrogates: Sequence[Surrogate]) -> None:
        with nullcontext() if self.sync_each_chunk else self.wrapped.coalesce_grad_reduction():
            for number, surrogate in enumerate(surrogates, start=1):
                if self.sync_each_chunk:
                    self.wrapped.set_gradient_accumulation_boundary(number == len(surrogates))
                self.wrapped.optimizer.clear_backward_seen_flag()  # its forward does so, but may be long past
                self.wrapped.backward(surrogate(), scale_wrt_gas=False)

    def step(self) -> None:
        self.wrapped.step()


def engine_for(model: nn.Module, sync_each_chunk: bool = False) -> Engine:
    """The engine for a model as the Trainer has wrapped it. `sync_each_chunk` is of engines that shard the gradient."""
    if isinstance(model, Replica):
        return DDPEngine(model)
    if isinstance(model, FSDPModule):
        return FSDP2Engine(model, sync_each_chunk)
    if is_deepspeed(model):
        return DeepSpeedEngine(model, sync_each_chunk and model.zero_optimization_partition_gradients())
    if world_size() > 1:
        raise ValueError(f"{type(model).__name__} on {world_size()} ranks: no gradient would cross them")
    return Engine(model)


def gradient_is_large(model: nn.Module, device: torch.device) -> bool:
    """Whether the whole gradient takes more than a quarter of the GPU."""
    if device.type != "cuda":
        return False
    sizes = (getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters() if p.requires_grad)
    gradient = sum(sizes)  # ds_numel: of ZeRO-3, whose weights are empty between uses
    return gradient > torch.cuda.get_device_properties(device).total_memory / 4


def fsdp2_precision(bf16: bool) -> MixedPrecisionPolicy:
    """FSDP2's policy for float32 weights and sums. accelerate's own one also adds gradients up in bfloat16."""
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()


def deepspeed_precision(bf16: bool) -> dict[str, Any]:
    """The part of DeepSpeed's config that gives float32 weights and sums, with bfloat16 products where `bf16`.

    Its own `bf16` adds the gradients of all chunks up in bfloat16: the error grows with their number. It would also
    reduce the gradient of each module in `lower_precision_safe_modules` in bfloat16.
    """
    return {
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def load_weights_once(args: TrainingArguments) -> None:
    """Read or draw the weights on the first rank of each node, which then hands them out. ZeRO-3 does so by itself."""
    if args.fsdp:
        args.fsdp_plugin_args["cpu_ram_efficient_loading"] = True
        enable_fsdp_ram_efficient_loading()


def wrap_model(
    model: Any, optimizer: torch.optim.Optimizer, engine: str, device: torch.device, bf16: bool = False
) -> tuple[Any, torch.optim.Optimizer]:
    """Wrap a model in an engine, by name, without a Trainer: no clipping, no schedule.

    Args:
        engine: plain, ddp, fsdp2, zero1, zero2 or zero3.
        bf16: as the Trainer's flag: float32 weights, under autocast.
    """
    if bf16 and not engine.startswith("zero"):
        model.forward = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)(model.forward)
    if engine == "ddp":
        return Replica(model), optimizer
    if engine == "fsdp2":
        for module in model.modules():
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mp_policy=fsdp2_precision(bf16))
        fully_shard(model, mp_policy=fsdp2_precision(bf16))
        (group,) = optimizer.param_groups
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        return model, type(optimizer)(trained, **{k: v for k, v in group.items() if k != "params"})
    if engine.startswith("zero"):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": int(engine[-1])},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
            **deepspeed_precision(bf16),
        }
        wrapped, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return wrapped, optimizer
    return model, optimizer


def is_fsdp2(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def is_deepspeed(model: nn.Module) -> bool:
    """Without importing DeepSpeed, which takes seconds and is an extra."""
    return type(model).__module__.startswith("deepspeed.")


def whole_gradient(wrapped: nn.Module, parameter: nn.Parameter) -> Tensor | None:
    """A parameter's gradient as the optimizer sees it, gathered from the ranks' shards where it is sharded.

    None if the backward has not reached it. All ranks must call it.
    """
    if is_deepspeed(wrapped):
        from deepspeed.utils import safe_get_full_grad

        gradient: Any = safe_get_full_grad(parameter)
    else:
        gradient = parameter.grad
    if gradient is None:
        return None
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def load_trained_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Copy whole weights into the shards of FSDP2. Frozen ones need not be among them. All ranks call it."""
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def whole_weights(model: Any, trained_only: bool = False) -> dict[str, Tensor] | None:
    """All weights on the first rank's CPU (an empty dict on the others), or None where every rank holds them.

    With `trained_only`, those that are trained.

    Gathered one by one, never all on one device. All ranks must call it.
    """
    if is_fsdp2(model):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
        return cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    if is_deepspeed(model) and model.zero_optimization_partition_weights():
        import deepspeed

        weights = {}
        for name, parameter in model.module.named_parameters():
            if trained_only and not parameter.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                if rank() == 0:
                    weights[name] = parameter.detach().to("cpu", copy=True)
        return weights
    return None


def on_whole_matrix(function: Callable[..., Tensor], matrix: Tensor, *arguments: Any) -> Tensor:
    """`function(matrix, *arguments)`, on the whole matrix where ranks hold shards of it. All ranks must call it then.

    Returns:
        Sharded as `matrix` is.
    """
    if not isinstance(matrix, DTensor):
        return function(matrix, *arguments)
    whole = function(matrix.full_tensor(), *arguments)
    return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)  # all ranks hold it
