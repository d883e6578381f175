"""EmbeddingTrainer: Hugging Face's loop, with our batches, our two-pass step and our model folder put into it."""

import os
import shutil
import time
from collections import Counter
from pathlib import Path

import torch
from torch.utils.data import BatchSampler, DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from gritlm.arguments import EmbeddingTrainingArguments
from gritlm.data.collator import BatchBuilder
from gritlm.distributed import all_reduce_sum, barrier, make_engine
from gritlm.errors import UserError
from gritlm.gradcache import two_pass_step
from gritlm.model_folder import save_model_folder
from gritlm.models.embedder import Embedder
from gritlm.objective import ContrastiveBatch, Objective

UNFINISHED = ".unfinished"  # where a checkpoint is written before it is renamed


class StepSampler(BatchSampler):
    """The keys (epoch, step) of one epoch, each a batch of its own; the Trainer sets the epoch."""

    def __init__(self, steps: int):
        self.steps, self.epoch = steps, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        for step in range(self.steps):
            yield [(self.epoch, step)]


class StepClock(TrainerCallback):
    """Where a step's time goes. On CUDA it records events and waits for the device only when read."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, object]] = []

    def mark(self, name: str) -> None:
        """The part `name` ends now; it began at the previous mark."""
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((name, moment))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.mark("optimizer")

    def read(self) -> Counter:
        """Seconds per part since the last read."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds: Counter = Counter()
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            seconds[name] += before.elapsed_time(after) / 1000 if self.cuda else after - before
        self.marks = self.marks[-1:]
        return seconds


class EmbeddingTrainer(Trainer):
    """Trains an `Embedder` on the batches of a `BatchBuilder`.

    Args:
        model: the embedder.
        args: the run's flags.
        train_dataset: builds this rank's slice of any global batch.
    """

    def __init__(self, model: Embedder, args: EmbeddingTrainingArguments, train_dataset: BatchBuilder, **kwargs):
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.objective = Objective(args.temperature, args.negatives_cross_device)
        self.clock = StepClock(args.device)
        self.add_callback(self.clock)
        self.counts: Counter = Counter()
        self._save_to: str | None = None

    # ---- data

    def get_train_dataloader(self) -> DataLoader:
        # Not through accelerate: it would replace the order and share each batch out over the ranks again.
        sampler = StepSampler(len(self.train_dataset))
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=_only,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=workers > 0,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        loader.set_epoch = sampler.set_epoch  # the name under which the Trainer looks for it
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.clock.mark("other")
        batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.clock.mark("data")
        return batch

    # ---- the step

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One global batch. Returns this rank's share of the loss times the ranks: their mean is the global loss."""
        model.train()
        self.counts.update(real_tokens=inputs["real_tokens"], padded_tokens=inputs["padded_tokens"])
        inputs = self._prepare_inputs(inputs)
        layout = ContrastiveBatch(**inputs["layout"])
        result = two_pass_step(
            make_engine(model), inputs["chunks"], lambda vectors: self.objective(vectors, layout), self.clock.mark
        )
        if not torch.isfinite(result.loss):
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is {result.loss.item()}; data set {inputs['dataset']}, "
                f"rows {', '.join(inputs['rows'][:8])}{', ...' if len(inputs['rows']) > 8 else ''}"
            )
        return result.loss * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._speed()
        super().log(logs, start_time)

    def _speed(self) -> dict[str, float]:
        """Tokens a second over all ranks, the share of them that is not padding, and where rank 0's time went."""
        seconds = self.clock.read()
        total = sum(seconds.values()) or 1.0
        counts = torch.tensor([self.counts["real_tokens"], self.counts["padded_tokens"]], device=self.args.device)
        real, padded = all_reduce_sum(counts).tolist()
        self.counts.clear()
        parts = ("data", "pass_1", "loss", "pass_2", "optimizer", "other")
        return {
            "tokens_per_second": round(real / total, 1),
            "real_token_share": round(real / max(padded, 1), 4),
            **{f"time_share/{part}": round(seconds[part] / total, 4) for part in parts},
        }

    # ---- what comes out

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_model_folder(self.accelerator.unwrap_model(self.model), self.train_dataset.encoder, folder)

    def _get_output_dir(self, trial) -> str:
        return self._save_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Written aside by all ranks, then renamed by one: a checkpoint folder is whole or absent."""
        run, aside = Path(self.args.output_dir), Path(self.args.output_dir) / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        barrier()
        self._save_to = str(aside)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._save_to = None
        barrier()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            shutil.rmtree(run / name, ignore_errors=True)
            os.replace(aside / name, run / name)
            shutil.rmtree(aside, ignore_errors=True)
            rotate_checkpoints(output_dir=str(run), save_total_limit=self.args.save_total_limit)
        barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.model.load_weights(resume_from_checkpoint)


def _only(batch: list[dict]) -> dict:
    (item,) = batch
    return item
