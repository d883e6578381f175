"""CheckpointTrainer: Hugging Face's Trainer with our model folder, and checkpoints that are whole or absent.

FSDP2 and DeepSpeed write pickles. All other files of a checkpoint are read without unpickling.
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from gritlm.distributed import ShardsUnsaved, barrier
from gritlm.models.embedder import Embedder
from gritlm.models.families import dropouts
from gritlm.models.folder import save_model_folder
from gritlm.training.checkpoints import (
    OPTIMIZER,
    SCHEDULER,
    STAGING_FOLDER,
    TEACHER_PROJECTION,
    check_finite,
    checkpoint_name,
    engine_name,
    explain_unsaved,
    publish_checkpoint,
    random_state_file,
    rotate_checkpoints,
)
from gritlm.training.engines import whole_weights
from gritlm.training.monitors import FiniteWatch, Watchdog
from gritlm.training.run_folder import add_card
from gritlm.training.run_log import log
from gritlm.training.state_files import load_state, random_states, restore_random_states, save_state


class CheckpointTrainer(Trainer):
    """Writes and reads checkpoints. `EmbeddingTrainer` sets the attributes.

    Attributes:
        embedder: the model, not wrapped.
        run_settings: written into each checkpoint, which resumes only a run with the same ones.
    """

    embedder: Embedder
    run_settings: dict[str, Any]
    finite: FiniteWatch
    watchdog: Watchdog | None

    def _mark(self, part: str, batch: str = "", growing: Path | None = None) -> None:
        if self.watchdog:
            self.watchdog.mark(f"step {self.state.global_step + 1}, {part}{batch}", growing)

    # ---- write

    def write_model(self, folder: Path) -> list[str]:
        """Write the model folder, gathered from all ranks' shards. Returns its files. All ranks call it."""
        weights = whole_weights(self.model_wrapped)
        if not self.args.should_save:
            return []
        check_finite(self.embedder.state_dict() if weights is None else weights)
        save_model_folder(self.embedder, self.processing_class, folder, weights)
        add_card(folder, self.args.output_dir or "", self.state.global_step)
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.write_model(Path(output_dir or self.args.output_dir))

    def write_checkpoint(self, folder: Path) -> list[str]:
        """Write the model folder and everything else that a resume needs. Returns the model folder's files."""
        served = self.write_model(folder)
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
        header = {"engine": engine_name(self.args), "ranks": self.args.world_size, "flags": self.run_settings}
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
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_state(self.optimizer.state_dict(), Path(output_dir) / OPTIMIZER)
            save_state(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)
            if self.embedder.teacher_projection is not None:
                save_state(self.embedder.teacher_projection.state_dict(), Path(output_dir) / TEACHER_PROJECTION)

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
        elif any(dropouts(self.embedder.config)):
            log.warning("rank %d: no random state in %s; dropout differs", self.args.process_index, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.embedder.load_weights(resume_from_checkpoint)
            if self.embedder.teacher_projection is not None and not self.is_deepspeed_enabled:
                weights = load_state(Path(resume_from_checkpoint) / TEACHER_PROJECTION)
                self.embedder.teacher_projection.load_state_dict(weights)
