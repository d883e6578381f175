"""How much disk space a run needs: for one checkpoint, and for --output_dir when it holds the most."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gritlm.errors import UserError
from gritlm.files import size_text
from gritlm.models.base_files import Base
from gritlm.models.lora import adapter_shapes
from gritlm.report.run import WEIGHT_COPIES
from gritlm.training.adapters import adapter_config
from gritlm.training.arguments import EmbeddingTrainingArguments, RunArguments, TuningArguments
from gritlm.training.checkpoints import STAGING_FOLDER
from gritlm.training.engine_files import engine_asked_for
from gritlm.training.optimizers import is_hidden_matrix
from gritlm.training.rehearsal import build_optimizer, steps_in_all

FLOAT32 = 4  # bytes
MATRIX, VECTOR = (521, 523), (541,)  # weights on which an optimizer's state is measured; no two sizes are equal
# Copies of the float32 weights in a checkpoint: the model folder, and what FSDP2 and DeepSpeed store beside it.
COPIES = {"ddp": 1, "fsdp2": 2, "zero1": 3, "zero2": 3, "zero3": 2}


@dataclass
class DiskSpace:
    """What a run stores."""

    model: int  # bytes of a model folder
    checkpoint: int  # bytes
    kept: int  # checkpoints in the folder while no save is under way
    writing: bool  # whether another one is written beside them
    at_least: bool  # the optimizer's state could not be measured
    copies: int = 0  # of the model folder, by --merge_last

    @property
    def fullest(self) -> int:
        checkpoints = max((self.kept + self.writing) * self.checkpoint, self.kept * self.checkpoint + self.model)
        return checkpoints + self.copies * self.model

    def __str__(self) -> str:
        parts = f"one checkpoint {size_text(self.checkpoint)}, {self.kept} kept{', one being written' * self.writing}"
        parts += f", {self.copies} copies of the weights, {size_text(self.model)} each" if self.copies else ""
        return f"{'at least ' * self.at_least}{size_text(self.fullest)} at its fullest ({parts})"


def check_disk_space(run: RunArguments, config: PreTrainedConfig, steps_per_epoch: int) -> list[str]:
    """What the run will write, in words. Empty if the weights are not known from the config.

    Raises:
        UserError: --output_dir has less room.
    """
    args, model = run.training, run.model
    shapes = Base(model.model_name_or_path, config, model.trust_remote_code).expected
    if not shapes:
        return []
    if model.projection:
        shapes |= {"projection.weight": [model.projection, config.hidden_size], "projection.bias": [model.projection]}
    adapter = adapter_config(run, config)
    new = {name: shape for name, shape in shapes.items() if name.startswith("projection.")}
    trained = shapes if adapter is None else adapter_shapes(config, adapter) | new
    engine, steps = engine_asked_for(run.command.parsed), steps_in_all(args, steps_per_epoch)
    needed = disk_space(args, shapes, engine, steps, run.tuning, trained)
    folder = Path(args.output_dir or "")
    free, there = free_space(folder), bytes_of_checkpoints(folder)
    if free is None:
        return [f"  disk: the run needs {needed}"]
    held = f", {size_text(there)} of it there already" if there else ""
    if needed.fullest - there > free:
        limit = f"lower --save_total_limit (now {args.save_total_limit}), or " if needed.kept > 1 else ""
        limit += f"--merge_last (now {args.merge_last}), or " if needed.copies else ""
        raise UserError(
            f"--output_dir {folder}: the run needs {needed}{held}, found {size_text(free)} free; "
            f"{limit}name another folder"
        )
    return [f"  disk: the run needs {needed}{held}; {size_text(free)} are free in {folder}"]


def disk_space(
    args: EmbeddingTrainingArguments,
    shapes: dict[str, list[int]],
    engine: str,
    steps: int,
    tuning: TuningArguments | None = None,
    trained: dict[str, list[int]] | None = None,
) -> DiskSpace:
    """What a run of so many steps needs for weights of these shapes. Checkpoints hold those that are trained."""
    tuning, trained = tuning or TuningArguments(), shapes if trained is None else trained
    weights, saved = (sum(map(math.prod, part.values())) for part in (shapes, trained))
    size = FLOAT32 // 2 if tuning.bf16_weights else FLOAT32
    published = size if tuning.ema_decay is None else FLOAT32
    matrices = {n: shape for n, shape in trained.items() if tuning.use_muon and is_hidden_matrix(n, len(shape))}
    others = [shape for name, shape in trained.items() if name not in matrices]
    if engine in ("zero1", "zero2", "zero3"):  # they flatten the weights
        others = [[saved]]
    state = optimizer_state(args, others)
    more = FLOAT32 * sum(map(math.prod, matrices.values()))  # Muon's momentum
    more += size * saved if tuning.ema_decay is not None else 0  # beside the average
    saves, limit = count_saves(args, steps), args.save_total_limit or math.inf
    if args.metric_for_best_model:
        limit = max(limit, 2)  # the best and the newest
    kept = int(min(saves, limit))
    checkpoint, copies = COPIES[engine] * published * saved + (state or 0) + more, min(saves, args.merge_last)
    return DiskSpace(published * weights, checkpoint, kept, saves > kept, state is None, copies)


def count_saves(args: EmbeddingTrainingArguments, steps: int) -> int:
    """Checkpoints that the run writes: after the first step, at each --save_steps or epoch, after the last step."""
    if args.save_strategy == "no":
        return 0
    if args.save_strategy == "epoch":
        return min(1 + math.ceil(args.num_train_epochs), steps)
    share = args.eval_steps if args.save_strategy == "best" else args.save_steps  # at most each evaluation is the best
    every = math.ceil(share * steps) if share < 1 else int(share)
    return len({1, steps, *range(every, steps + 1, every)})


def optimizer_state(args: EmbeddingTrainingArguments, shapes: list[list[int]]) -> int | None:
    """Bytes of the optimizer's state, from the state after a step on two small weights; None if it cannot step here."""
    probe = nn.ParameterList([torch.ones(MATRIX), torch.ones(VECTOR)])
    try:
        optimizer = build_optimizer(args, probe)
        for weight in probe:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    except Exception:
        return None
    states = {weight.dim(): (weight, optimizer.state[weight].values()) for weight in probe}
    total = 0.0
    for shape in shapes:
        weight, state = states[len(shape)]
        for part in state:
            if isinstance(part, Tensor) and part.numel() > 1:
                total += part.element_size() * _scaled(part, weight, shape)
    return round(total)


def _scaled(part: Tensor, weight: Tensor, shape: list[int]) -> float:
    """The elements that a part of a weight's state has for a weight of this shape."""
    sizes = dict(zip(weight.shape, shape, strict=True))
    if all(length in sizes for length in part.shape):
        return math.prod(sizes[length] for length in part.shape)
    return part.numel() * math.prod(shape) / weight.numel()  # such as one number for each block of 256


def free_space(folder: Path) -> int | None:
    """Free bytes on the disk of a folder, or of the nearest parent that exists; None if they cannot be read."""
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free
    except (OSError, StopIteration):
        return None


def bytes_of_checkpoints(folder: Path) -> int:
    """Bytes of the checkpoints and weight-only copies in a folder, those unfinished included. A run replaces them."""
    names = (f"{PREFIX_CHECKPOINT_DIR}-*", STAGING_FOLDER, WEIGHT_COPIES)
    files = (path for name in names for found in folder.glob(name) for path in found.rglob("*"))
    sizes: dict[int, int] = {}  # by inode: a copy may be a link
    for path in files:
        try:
            sizes[path.stat().st_ino] = path.stat().st_size if path.is_file() else 0
        except OSError:  # a run that is ending may remove it
            continue
    return sum(sizes.values())
