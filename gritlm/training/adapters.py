"""LoRA in a run: its settings, what the start says of it, a check that it learns, and the merged model."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from gritlm.distributed import gather_objects, rank
from gritlm.errors import UserError
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.base_files import Base
from gritlm.models.embedder import Embedder
from gritlm.models.folder import save_model_folder
from gritlm.models.hub import DECODER, base_of, model_folder
from gritlm.models.lora import (
    QUANTISED_BASE,
    adapter_shapes,
    dequantise,
    load_adapter,
    make_config,
    match_targets,
    merge,
    read_adapter_config,
)
from gritlm.models.tokenizer import TextTokenizer
from gritlm.training.arguments import RunArguments
from gritlm.training.engines import whole_gradient
from gritlm.training.run_log import log

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_FOLDER = "adapter"  # of --keep_adapter, in the published folder
CHECKED_AFTER = 3  # steps; lora_A's gradient is zero until lora_B has moved
TOLERANCE = 1e-5  # of 1 - cosine between the merged model and the adapter on its base


def uses_adapter(run: RunArguments) -> bool:
    return run.tuning.lora or run.tuning.qlora


def adapter_config(run: RunArguments, config: PreTrainedConfig) -> "LoraConfig | None":
    """peft's settings of the run's adapter, or None for a run without one.

    Raises:
        UserError: --lora_target_modules names no linear layer, or the adapter cannot be continued.
    """
    tuning, name = run.tuning, run.model.model_name_or_path
    if not uses_adapter(run):
        return None
    base = base_of(name) if tuning.continue_adapter else name
    base = os.path.abspath(base) if Path(base).is_dir() else base
    if not tuning.continue_adapter:
        endings = match_targets(config, tuning.lora_target_modules)
        return make_config(tuning.lora_r, tuning.lora_alpha, tuning.lora_dropout, endings, base)
    folder = Path(model_folder(name, DECODER))
    found = read_adapter_config(folder)
    if (folder / QUANTISED_BASE).is_file() != tuning.qlora:
        was, wanted = ("float", "--lora") if tuning.qlora else ("4-bit", "--qlora")
        raise UserError(f"--continue_adapter: found an adapter of a {was} base, wanted {wanted}")
    found.base_model_name_or_path, found.inference_mode = base, False
    return found


def describe_adapter(run: RunArguments, config: PreTrainedConfig) -> list[str]:
    """Lines on the adapter that is the base, and on the one that is trained. Raises UserError, see `adapter_config`."""
    name, adapter = run.model.model_name_or_path, adapter_config(run, config)
    base = base_of(name)
    lines = []
    if base != name and not run.tuning.continue_adapter and not run.model.reset_weight:
        lines.append(f"base: an adapter, merged into {base} first; --lora --continue_adapter goes on with it")
    if adapter is None:
        return lines
    shapes = adapter_shapes(config, adapter), Base(name, config).expected
    trained, whole = (sum(map(math.prod, part.values())) for part in shapes)
    kinds = adapter.target_modules
    where = kinds if isinstance(kinds, str) else ", ".join(sorted(kinds or ()))
    return [
        *lines,
        f"adapter: {'QLoRA' if run.tuning.qlora else 'LoRA'}{', continued' * run.tuning.continue_adapter}, rank "
        f"{adapter.r}, alpha {adapter.lora_alpha:g}, dropout {adapter.lora_dropout:g}, on {where}: {trained:,} weights "
        f"are trained, {trained / whole:.2%} of the backbone's {whole:,}",
    ]


def add_adapter(run: RunArguments, embedder: Embedder) -> None:
    """Attach the run's adapter to the model, where it has one."""
    args, tuning = run.training, run.tuning
    config = adapter_config(run, embedder.config)
    if config is None:
        return
    embedder.add_adapter(config, args.seed)
    if tuning.continue_adapter:
        load_adapter(embedder.backbone, model_folder(run.model.model_name_or_path, DECODER))
    if tuning.qlora:
        embedder.quantise(args.device, torch.bfloat16 if args.bf16 else torch.float32)


class AdapterGradients:
    """Stops a run whose adapter does not learn, as where a layer's output is not used.

    After the third step with a learning rate above 0, each tensor must have had a gradient other than 0. Tensors that
    no backward reaches are named, and not counted.
    """

    def __init__(self, embedder: Embedder):
        self.embedder, self.steps = embedder, 0
        self.waiting = [name for name, p in embedder.named_parameters() if ".lora_" in name and p.requires_grad]

    def check(self, wrapped: nn.Module, learning_rate: float) -> None:
        """Called between a step's backward and its optimizer. All ranks call it."""
        if not self.waiting or learning_rate == 0:
            return
        self.steps += 1
        parameters = dict(self.embedder.named_parameters())  # FSDP2 has replaced those of the start
        gradients = {name: whole_gradient(wrapped, parameters[name]) for name in self.waiting}
        unreached = [name for name, gradient in gradients.items() if gradient is None]
        if len(unreached) == len(gradients):
            raise UserError("adapter: no gradient reaches any of its tensors; choose others with --lora_target_modules")
        if unreached and self.steps == 1:
            log.warning("adapter: no gradient can reach %s; not counted", ", ".join(unreached))
        still = [name for name, gradient in gradients.items() if gradient is not None and not gradient.any()]
        self.waiting = still
        if still and self.steps >= CHECKED_AFTER:
            more = f" and {len(still) - 1} more" if still[1:] else ""
            raise UserError(
                f"adapter: {still[0]}{more} had a gradient of 0 in the first {self.steps} steps, wanted another: it "
                "learns nothing; choose other layers with --lora_target_modules"
            )


# ---- the merged model


def merged(
    run: RunArguments, text_tokenizer: TextTokenizer, write: Callable[[Path], object]
) -> Callable[[Path], object]:
    """`write` puts an adapter folder in a place. What is returned puts the merged model there; all ranks call it."""

    def write_merged(folder: Path) -> None:
        adapter, problem = folder / ADAPTER_FOLDER, ""
        write(adapter)
        if rank() == 0:
            try:
                save_model_folder(merge_checked(run, text_tokenizer, adapter), text_tokenizer, folder)
            except UserError as error:
                problem = str(error)
            if not run.tuning.keep_adapter:
                shutil.rmtree(adapter)
        if problem := gather_objects(problem)[0]:  # all ranks end in one line
            raise UserError(problem)

    return write_merged if uses_adapter(run) else write


def merge_checked(run: RunArguments, text_tokenizer: TextTokenizer, adapter: Path) -> Embedder:
    """The base with an adapter folder of this run merged into it.

    Raises:
        UserError: it gives other vectors than the adapter on its base, or the same as the base.
    """
    unset_hf_deepspeed_config()  # this rank holds whole weights now
    name, tuning = run.model.model_name_or_path, run.tuning
    config = load_config(str(adapter), None, run.model.trust_remote_code)
    remote, keep = run.model.trust_remote_code, not tuning.continue_adapter
    backbone = load_backbone(name, config, trust_remote_code=remote, merge_adapters=keep)
    embedder = Embedder(backbone, text_tokenizer.contract, run.model.projection)
    embedder.load_projection(adapter)
    base = probe_vectors(embedder)
    embedder.add_adapter(read_adapter_config(adapter))
    load_adapter(backbone, adapter)
    if tuning.qlora:  # on the device that has trained it: another may round the scales differently
        embedder.quantise(run.training.device)
        embedder.to(run.training.device)
    tuned = probe_vectors(embedder)
    if tuning.qlora:
        dequantise(backbone)
        embedder.quantised = False
    merge(backbone)
    embedder.adapter = None
    found = probe_vectors(embedder)
    check_merged(found, tuned, base)
    return embedder


def check_merged(found_ND: Tensor, tuned_ND: Tensor, base_ND: Tensor) -> None:
    """Check vectors of the merged model against those of the adapter on its base, and of the base alone."""
    cosine = torch.cosine_similarity(found_ND, tuned_ND).min().item()
    error, change = ((found_ND - other).norm(dim=1).max().item() for other in (tuned_ND, base_ND))
    stays = "nothing is published, the checkpoints stay"
    if not 1 - cosine <= TOLERANCE:
        raise UserError(
            f"adapter: the merged model has cosine {cosine:.7f} with the adapter on its base, wanted at least "
            f"{1 - TOLERANCE} on {len(found_ND)} probe texts; {stays}"
        )
    if not change > error:
        raise UserError(f"adapter: it changes no vector of {len(found_ND)} probe texts (by {change:.0e}); {stays}")
    to_base = torch.cosine_similarity(found_ND, base_ND).min().item()
    log.info("adapter merged: cosine with the adapter %.7f, with the base %.4f, at least", cosine, to_base)


@torch.no_grad()
def probe_vectors(embedder: Embedder) -> Tensor:
    """Vectors of 64 texts of 1 to 32 random tokens, float64 (64, D) on the CPU."""
    lengths = torch.arange(64) // 2 + 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, embedder.config.vocab_size, (int(lengths.sum()),), generator=generator)
    device = next(embedder.parameters()).device
    runs = tuple((2, length) for length in range(1, 33))
    parts = (part.to(device) for part in (ids, lengths, torch.zeros_like(lengths)))
    return embedder.eval()(*parts, runs).double().cpu()
