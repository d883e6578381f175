"""wandb and TensorBoard: a resumed run goes on in the same run there, takes no step twice, and shows all flags."""

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from gritlm.training.run_folder import read_run_file, update_run_file
from gritlm.training.run_log import is_new, last_logged_steps

WANDB_ID = "wandb id"  # the entry of run.json that names the run on wandb


class _NoStepTwice(TrainerCallback):
    """Passes on what has not been reported before."""

    def __init__(self, folder: Path, flags: dict[str, Any]):
        super().__init__()
        self.folder, self.flags, self.last_logged = folder, flags, last_logged_steps(folder)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if is_new(logs, state.global_step, self.last_logged):
            super().on_log(args, state, control, logs=logs, **kwargs)


class OneTensorBoardRun(_NoStepTwice, TensorBoardCallback):
    """Hugging Face's callback, in one folder for the run and its continuations."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.logging_dir = os.environ.get("TENSORBOARD_LOGGING_DIR", str(self.folder / "tensorboard"))
        super().on_train_begin(args, state, control, **kwargs)
        if self.tb_writer:
            self.tb_writer.add_text("flags", f"```\n{json.dumps(self.flags, indent=2, default=str)}\n```")


class OneWandbRun(_NoStepTwice, WandbCallback):
    """Hugging Face's callback, in one wandb run for the run and its continuations."""

    def setup(self, args, state, model, **kwargs):
        if state.is_world_process_zero and self._wandb.run is None:
            name = os.environ.get("WANDB_RUN_ID") or read_run_file(self.folder).get(WANDB_ID) or uuid4().hex[:8]
            update_run_file(self.folder, **{WANDB_ID: name})
            project = os.environ.get("WANDB_PROJECT", "huggingface")  # as Hugging Face has it
            self._wandb.init(project=project, name=args.run_name, id=name, resume="allow")
            self._wandb.config.update(json.loads(json.dumps(self.flags, default=str)), allow_val_change=True)
        super().setup(args, state, model, **kwargs)


def report_to_one_run(trainer: Trainer, folder: Path, flags: dict[str, Any]) -> None:
    """Put these callbacks in the place of Hugging Face's, where --report_to has asked for those."""
    for theirs, ours in ((TensorBoardCallback, OneTensorBoardRun), (WandbCallback, OneWandbRun)):
        if trainer.pop_callback(theirs):
            trainer.add_callback(ours(folder, flags))
