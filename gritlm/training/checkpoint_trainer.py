"""CheckpointTrainer: Hugging Face's Trainer with our model folder, and checkpoints that are whole or absent.

FSDP2 and DeepSpeed write pickles. All other files of a checkpoint are read without unpickling.
"""

import functools
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors import SafetensorError
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import ExportableState

from gritlm.distributed import ShardsUnsaved, barrier
from gritlm.models.cpu_linear import products_of
from gritlm.models.embedder import Embedder
from gritlm.models.folder import save_model_folder
from gritlm.training.checkpoints import (
    OPTIMIZER,
    SCHEDULER,
    STAGING_FOLDER,
    TEACHER_PROJECTION,
    TRAINED,
    TRAINED_WEIGHTS,
    check_finite,
    checkpoint_name,
    explain_unsaved,
    keep_weights,
    publish_checkpoint,
    random_state_file,
    rotate_checkpoints,
)
from gritlm.training.engines import load_trained_weights, whole_weights
from gritlm.training.linear_products import ONEDNN
from gritlm.training.monitors import FiniteWatch, Watchdog
from gritlm.training.optimizers import OptimizerTrainer
from gritlm.training.run_folder import add_card
from gritlm.training.run_log import log
from gritlm.training.state_files import load_state, random_states, restore_random_states, save_state
from gritlm.training.weight_average import WeightAverage


class CheckpointTrainer(OptimizerTrainer):
    """Writes and reads checkpoints. `EmbeddingTrainer` sets the attributes.

    Attributes:
        embedder: the model, not wrapped.
        run_settings: written into each checkpoint, which resumes only a run with the same ones.
    """

    embedder: Embedder
    run_settings: dict[str, Any]
    finite: FiniteWatch
    watchdog: Watchdog
    average: WeightAverage | None = None

    def published_weights(self) -> AbstractContextManager[None]:
        """The model with the weights that are published: the average, where there is one."""
        return self.average.in_place() if self.average else nullcontext()

    def _mark(self, part: str, batch: str = "", growing: Path | None = None) -> None:
        self.watchdog.mark(f"step {self.state.global_step + 1}, {part}{batch}", growing)

    # ---- write

    def write_model(self, folder: Path) -> list[str]:
        """Write the model folder, gathered from all ranks' shards. Returns its files. All ranks call it."""
        weights = whole_weights(self.model_wrapped, trained_only=self.embedder.adapter is not None)
        if not self.args.should_save:
            return []
        with self.published_weights():
            check_finite(self.embedder.trained_state() if weights is None else weights)
            save_model_folder(self.embedder, self.processing_class, folder, weights)
        if self.embedder.adapter is None:
            add_card(folder, self.args.output_dir or "", self.state.global_step)
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.write_model(Path(output_dir or self.args.output_dir))

    def write_checkpoint(self, folder: Path) -> list[str]:
        """Write the model folder and everything else that a resume needs. Returns the model folder's files."""
        served = self.write_model(folder)
        if self.args.should_save:
            keep_weights(folder, Path(self.args.output_dir), self.state.global_step, self.args.merge_last)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            for part in (*self.callback_handler.callbacks, self.control):
                if isinstance(part, ExportableState):
                    self.state.stateful_callbacks[type(part).__name__] = part.state()
            self.state.save_to_json(str(folder / "trainer_state.json"))
        return served

    def _save_checkpoint(self, model, trial) -> None:
        """All ranks write into a staging folder, then the first renames it: a checkpoint is whole or absent."""
        self.finite.check()
        run, name = Path(self.args.output_dir), checkpoint_name(self.state.global_step)
        staging = run / STAGING_FOLDER
        self._mark("saving", growing=staging)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            (staging / name).mkdir(parents=True)
        barrier()
        header = {"engine": self.args.engine, "ranks": self.args.world_size, "flags": self.run_settings}
        header[ONEDNN] = products_of(self.embedder)
        try:
            served = self.write_checkpoint(staging / name)
            barrier()
            if self.args.should_save:
                publish_checkpoint(staging / name, run / name, header, served)
        except (OSError, RuntimeError, SafetensorError, ShardsUnsaved) as error:
            explain_unsaved(error, run, name)
            raise
        if self.args.should_save:
            rotate_checkpoints(run, self.args.save_total_limit, self.state.best_global_step)
            shutil.rmtree(staging, ignore_errors=True)
        barrier()
        self._mark("saved")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        adapter = self.embedder.adapter is not None
        if adapter and self.is_fsdp_enabled:  # without the frozen weights
            weights, folder = whole_weights(self.model_wrapped, trained_only=True), Path(output_dir)
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            if self.args.should_save:
                save_state(weights, folder / TRAINED)
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        elif self.is_fsdp_enabled or self.is_deepspeed_enabled:
            if adapter:
                save = functools.partial(type(self.model_wrapped).save_checkpoint, self.model_wrapped)
                self.model_wrapped.save_checkpoint = functools.partial(save, exclude_frozen_parameters=True)
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_state(self.optimizer.state_dict(), Path(output_dir) / OPTIMIZER)
            save_state(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)
            if self.embedder.teacher_projection is not None:
                save_state(self.embedder.teacher_projection.state_dict(), Path(output_dir) / TEACHER_PROJECTION)
            if self.average:
                save_state([weight.detach() for weight in self.average.weights], Path(output_dir) / TRAINED_WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint:
            self.optimizer.load_state_dict(load_state(Path(checkpoint) / OPTIMIZER))
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint) / SCHEDULER))

    def _save_rng_state(self, output_dir: str) -> None:
        save_state(random_states(self.args.device), Path(output_dir) / random_state_file(self.args.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not checkpoint:
            return
        path = Path(checkpoint) / random_state_file(self.args.process_index)
        if path.is_file():
            restore_random_states(load_state(path), self.args.device)
        elif self.embedder.drops_out:
            log.warning("rank %d: no random state in %s; dropout differs", self.args.process_index, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled and self.embedder.adapter is not None:
            load_trained_weights(model, load_state(Path(resume_from_checkpoint) / TRAINED))
        elif self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            with self.published_weights():
                self.embedder.load_weights(resume_from_checkpoint)
            if self.average:
                self.average.restore(load_state(Path(resume_from_checkpoint) / TRAINED_WEIGHTS))
            if self.embedder.teacher_projection is not None and not self.is_deepspeed_enabled:
                weights = load_state(Path(resume_from_checkpoint) / TEACHER_PROJECTION)
                self.embedder.teacher_projection.load_state_dict(weights)
