"""EmbeddingTrainer: Hugging Face's loop, with our batches, our two-pass step and our model folder put into it."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import AutocastKwargs, DynamoBackend
from safetensors import SafetensorError
from torch.utils.data import BatchSampler, DataLoader
from transformers import Trainer, TrainerCallback

from gritlm.data.batches import BatchBuilder
from gritlm.distributed import ShardsUnsaved, all_reduce_max, all_reduce_sum, barrier, ranks_on_this_host
from gritlm.errors import RankError
from gritlm.models.chunks import to_device
from gritlm.models.compiled import compile_layers, uncompile_layers
from gritlm.models.embedder import Embedder
from gritlm.models.folder import save_model_folder
from gritlm.models.probe import probe_attention
from gritlm.training.arguments import EmbeddingTrainingArguments
from gritlm.training.checkpoints import (
    STAGING_FOLDER,
    check_finite,
    checkpoint_name,
    engine_of,
    explain_unsaved,
    publish_checkpoint,
    rotate_checkpoints,
)
from gritlm.training.engines import engine_for, whole_weights
from gritlm.training.gradcache import ActivationMemory, two_pass_step
from gritlm.training.monitors import FiniteWatch, StepTimer, StopSignals, Watchdog
from gritlm.training.objective import ContrastiveBatch, Objective

TOKEN_COUNTS = ("real_tokens", "encoded_tokens", "padded_tokens")  # of all texts; once per equal text; with padding


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


class EmbeddingTrainer(Trainer):
    """Trains an `Embedder` on the batches of a `BatchBuilder`.

    Args:
        model: the embedder.
        args: the run's flags.
        train_dataset: builds this rank's slice of any global batch.
        attn: bb or cc, what the attention probe asks of the model before the first step.
        run_settings: the flags that a checkpoint is good for.
    """

    def __init__(
        self,
        model: Embedder,
        args: EmbeddingTrainingArguments,
        train_dataset: BatchBuilder,
        attn: str,
        run_settings: dict,
        **kwargs,
    ):
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.embedder, self.attn, self.run_settings = model, attn, run_settings
        self.objective = Objective(args.temperature, args.negatives_cross_device, args.negatives_ring)
        self.memory = ActivationMemory(args.activation_memory, args.device, ranks_on_this_host())
        self.clock = StepTimer(args.device)
        self.finite = FiniteWatch(args.device)
        self.signals = StopSignals()
        self.watchdog = Watchdog(args.hang_timeout) if args.hang_timeout else None
        self.stopped = False
        self.add_callback(self.clock)
        self.add_callback(TrainingCallback(self))
        self.counts: Counter = Counter()
        self._save_to: str | None = None
        self._served: list[str] = []
        # A forward uses each weight once; a cache would hold a bfloat16 copy of all of them until it ends.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        if self.is_fsdp_enabled and args.bf16:
            # accelerate would also add gradients up in bfloat16, over chunks and over ranks, and round the vectors.
            plugin = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )
        if args.torch_compile:
            self._compile()

    def train(self, *args, **kwargs):
        if self.watchdog:
            self.watchdog.start()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.signals.end()
            if self.watchdog:
                self.watchdog.end()

    def _mark(self, part: str, batch: str = "") -> None:
        if self.watchdog:
            self.watchdog.mark(f"step {self.state.global_step + 1}, {part}{batch}")

    def _compile(self) -> None:
        """Layer by layer, where accelerate would compile the model whole, and again for every packing."""
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        args = self.args
        options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
        problem = compile_layers(self.embedder, args.device, args.bf16, **options)
        if all_reduce_max(problem != "")[0]:
            uncompile_layers(self.embedder)
            if args.process_index == 0:
                print(f"--torch_compile: going on without. {problem or 'It failed on another rank.'}")

    def probe(self) -> dict[str, float]:
        """Attention is what was asked for, on the model as the engine has wrapped it."""
        text_tokenizer = engine_for(self.model_wrapped).model
        with torch.compiler.set_stance("force_eager"):  # what is probed here is not compiled: attention
            return probe_attention(text_tokenizer, self.embedder, self.args.device, self.attn, exact=not self.args.bf16)

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
        self._mark("waiting for its batch")
        batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.clock.mark("data")
        return batch

    # ---- the step

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One global batch. Returns this rank's share of the loss times the ranks: their mean is the global loss."""
        model.train()
        step, dataset, rows = self.state.global_step + 1, inputs["dataset"], inputs["rows"]
        batch = f"; data set {dataset}, rows {', '.join(rows[:4])}{', ...' if len(rows) > 4 else ''}"
        self._mark("pass_1", batch)
        self.stopped = bool(all_reduce_max(self.signals.received)[0])
        self.counts.update(**{name: inputs[name] for name in TOKEN_COUNTS})
        chunks = [to_device(chunk, self.args.device) for chunk in inputs["chunks"]]
        contrastive = ContrastiveBatch(**to_device(inputs["contrastive"], self.args.device))

        def mark(part: str) -> None:
            self.clock.mark(part)
            self._mark(f"behind {part}", batch)

        engine = engine_for(model)
        try:
            loss = two_pass_step(
                engine, chunks, lambda vectors: self.objective(vectors, contrastive), mark, self.memory
            )
        except torch.OutOfMemoryError as error:
            why = str(error).strip().splitlines()[0]
            ways = [f"lower --chunk_tokens (now {self.args.chunk_tokens})"]
            ways += ["--activation_memory 0"] * (self.args.activation_memory != "0")
            ways += ["--gradient_checkpointing True"] * (not self.args.gradient_checkpointing)
            whole = self.args.world_size > 1 and not self.is_fsdp_enabled and not self.is_deepspeed_enabled
            ways += ["--fsdp, which shards the model"] * whole
            raise RankError(f"step {step}, rank {self.args.process_index}: {why} Try: {', or '.join(ways)}") from error
        self.finite.loss(step, loss, dataset, rows)
        engine.step()
        return loss * self.args.world_size

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.finite.gradient_norm(self.state.global_step + 1, norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.finite.check()
            logs |= self._speed()
        super().log(logs, start_time)

    def _speed(self) -> dict[str, float]:
        """Tokens a second over all ranks, the share of them that is not padding; rank 0's memory and time."""
        seconds = self.clock.read()
        total = sum(seconds.values()) or 1.0
        counts = torch.tensor([self.counts[name] for name in TOKEN_COUNTS], device=self.args.device)
        real, encoded, padded = all_reduce_sum(counts).tolist()
        self.counts.clear()
        cuda = self.args.device.type == "cuda"
        memory = {"peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if cuda else {}
        parts = ("data", "pass_1", "loss", "pass_2", "optimizer", "other")
        return {
            "tokens_per_second": round(real / total, 1),
            "real_token_share": round(encoded / max(padded, 1), 4),
            **memory,
            **{f"time_share/{part}": round(seconds[part] / total, 4) for part in parts},
        }

    # ---- what comes out

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model folder, put together from all ranks' shards where the engine shards. All ranks call it."""
        folder = Path(output_dir or self.args.output_dir)
        weights = whole_weights(self.model_wrapped)
        if self.args.should_save:
            check_finite(self.embedder.state_dict() if weights is None else weights)
            save_model_folder(self.embedder, self.train_dataset.text_tokenizer, folder, weights)
            self._served = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def _get_output_dir(self, trial) -> str:
        return self._save_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Written aside by all ranks, then renamed by one: a checkpoint folder is whole or absent."""
        self.finite.check()
        self._mark("saving")
        run, name = Path(self.args.output_dir), checkpoint_name(self.state.global_step)
        aside = run / STAGING_FOLDER
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        barrier()
        self._save_to = str(aside)
        header = {"engine": engine_of(self.args), "ranks": self.args.world_size, "flags": self.run_settings}
        try:
            super()._save_checkpoint(model, trial)
            barrier()
            if self.args.should_save:
                publish_checkpoint(aside / name, run / name, header, self._served)
        except (OSError, RuntimeError, SafetensorError, ShardsUnsaved) as error:
            explain_unsaved(error, run, name)
            raise
        finally:
            self._save_to = None
        if self.args.should_save:
            rotate_checkpoints(run, self.args.save_total_limit)
            shutil.rmtree(aside, ignore_errors=True)
        barrier()
        self._mark("saved")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.embedder.load_weights(resume_from_checkpoint)


class TrainingCallback(TrainerCallback):
    """The trainer's own say in the loop: probe before the first step, save early, stop when asked to."""

    def __init__(self, trainer: EmbeddingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        found = self.trainer.probe()
        if args.process_index == 0:
            print(f"attention probe: passed ({', '.join(f'{name} {value:.0e}' for name, value in found.items())})")

    def on_step_end(self, args, state, control, **kwargs):
        # A save that cannot work shows after the first step, not hours later.
        first = state.global_step == 1 and args.save_strategy != "no"
        control.should_save = control.should_save or first or self.trainer.stopped
        control.should_training_stop = control.should_training_stop or self.trainer.stopped


def _only(batch: list[dict]) -> dict:
    (item,) = batch
    return item
