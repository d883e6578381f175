"""EmbeddingTrainer: Hugging Face's loop with our batches, two-pass step and model folder."""

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from gritlm.data.batches import Batch, BatchBuilder, ContrastiveBatch
from gritlm.data.loader import StepLoader, batch_or_error, explain_workers
from gritlm.distributed import all_reduce_max, all_reduce_sum, lost_a_rank, ranks_on_this_host
from gritlm.errors import RankError, UserError, first_line
from gritlm.models.attention import varlen_backward_bytes
from gritlm.models.compiled import compile_layers, uncompile_layers
from gritlm.models.embedder import Embedder
from gritlm.models.probe import probe_attention
from gritlm.models.tokenizer import TextTokenizer
from gritlm.training.adapters import AdapterGradients
from gritlm.training.arguments import EmbeddingTrainingArguments, TuningArguments
from gritlm.training.checkpoints import engine_name
from gritlm.training.engines import Replica, deepspeed_precision, engine_for, fsdp2_precision, gradient_is_large
from gritlm.training.evaluation import RunEvaluation
from gritlm.training.evaluation_trainer import EVALUATION, EvaluationTrainer
from gritlm.training.gradcache import ActivationMemory, is_out_of_memory, two_pass_step
from gritlm.training.monitors import FiniteWatch, LossMeter, SaveTimer, StepTimer, StopSignals, Watchdog
from gritlm.training.optimizers import describe_split
from gritlm.training.run_log import ProgressBar, RunLog, is_a_terminal, log
from gritlm.training.weight_average import WeightAverage

TIMED_PARTS = ("data", "pass_1", "loss", "pass_2", "optimizer", "other")


class EmbeddingTrainer(EvaluationTrainer):
    """Trains an `Embedder` on the batches of a `BatchBuilder`.

    Args:
        model: the embedder.
        args: the run's flags.
        objective: this rank's vectors, and where they belong -> its share of each loss term.
        train_dataset: builds this rank's slice of any global batch.
        processing_class: the tokenizer, saved with the model.
        attn: bb or cc, what the attention probe asks of the model before the first step.
        run_settings: written into each checkpoint, which resumes only a run with the same ones.
        evaluation: what evaluates the model between steps, or None.
        tuning: the flags of optimizers, precision and averages.
    """

    def __init__(
        self,
        model: Embedder,
        args: EmbeddingTrainingArguments,
        objective: Callable[[Tensor, ContrastiveBatch], dict[str, Tensor]],
        train_dataset: BatchBuilder,
        processing_class: TextTokenizer,
        attn: str,
        run_settings: dict[str, Any],
        evaluation: RunEvaluation | None = None,
        tuning: TuningArguments | None = None,
    ):
        if args.deepspeed:
            args.hf_deepspeed_config.config.update(deepspeed_precision(args.bf16))
            args.mixed_precision = "no"  # else accelerate would switch DeepSpeed's own bf16 on
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=evaluation,
            processing_class=processing_class,
        )
        self.embedder, self.objective, self.attn, self.run_settings = model, objective, attn, run_settings
        self.tuning = tuning or TuningArguments()
        if self.tuning.ema_decay is not None:
            self.average = WeightAverage(model, self.tuning.ema_decay)
        self.set_up_evaluation(evaluation, train_dataset.chunking)
        self.memory = ActivationMemory(args.activation_memory, args.device, ranks_on_this_host())
        self.timer, self.meter = StepTimer(args.device), LossMeter()
        self.tokens: Counter[str] = Counter()
        self.finite, self.adapter_gradients = FiniteWatch(args.device), AdapterGradients(model)
        self.signals = StopSignals()
        self.watchdog = Watchdog(args.hang_timeout) if args.hang_timeout else None
        self.stopped = False
        self._set_up_callbacks()
        # A forward uses each weight once; a cache would hold a bfloat16 copy of all of them until it ends.
        torch.set_autocast_cache_enabled(False)
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = fsdp2_precision(args.bf16)
        if args.torch_compile:
            self._compile()
        if args.deepspeed and model.adapter is not None:  # its checkpoints lack the frozen weights
            trained = model.trained_state()
            model.register_load_state_dict_post_hook(
                lambda _, keys: keys.missing_keys.__setitem__(slice(None), trained.keys() & {*keys.missing_keys})
            )

    def _set_up_callbacks(self) -> None:
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        for callback in (self.timer, TrainingCallback(self), SaveTimer(), RunLog(self.args.output_dir)):
            self.add_callback(callback)
        if not self.args.disable_tqdm and is_a_terminal():
            self.add_callback(ProgressBar)

    def train(self, *args, **kwargs):
        if self.watchdog:
            self.watchdog.start()
        try:
            return super().train(*args, **kwargs)
        except (RuntimeError, OSError, MemoryError) as error:  # a dead data worker interrupts whatever runs
            step = self.state.global_step + 1
            if lost_a_rank(error):
                raise UserError(f"step {step}: another rank has ended, its own message says why") from error
            problem = self._out_of_memory(error) if is_out_of_memory(error) else explain_workers(error)
            if not problem:
                raise
            raise RankError(f"step {step}, rank {self.args.process_index}: {problem}") from error
        finally:
            self.signals.end()
            if self.watchdog:
                self.watchdog.end()

    def _wrap_model(self, model, training: bool = True, dataloader=None):
        """Without --fsdp and --deepspeed, wrap the model here. accelerate would take torch's own DDP."""
        if isinstance(model, Replica) or self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.world_size == 1:
            return super()._wrap_model(model, training, dataloader)
        prepared = self.accelerator.prepare_model(model, evaluation_mode=True)  # its device, and autocast
        return Replica(prepared, self.args.ddp_bucket_cap_mb or 25)

    def _compile(self) -> None:
        """Compile layer by layer. accelerate would compile the whole model, again for every packing."""
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        torch.backends.cuda.matmul.allow_tf32 = False  # accelerate has switched it on
        args = self.args
        options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
        problem = compile_layers(self.embedder, args.device, args.bf16, **options)
        if all_reduce_max(problem != "")[0]:
            uncompile_layers(self.embedder)
            if args.process_index == 0:
                log.warning("--torch_compile: training without it. %s", problem or "It failed on another rank.")

    def probe(self) -> dict[str, float]:
        """Check that attention is what was asked for, on the model as the engine has wrapped it."""
        wrapped = engine_for(self.model_wrapped).model
        with torch.compiler.set_stance("force_eager"):  # attention is not compiled
            return probe_attention(wrapped, self.embedder, self.args.device, self.attn, exact=not self.args.bf16)

    # ---- data

    def get_train_dataloader(self) -> DataLoader:
        # Not through accelerate: it would replace the order, and share each batch out over the ranks again.
        args, workers = self.args, self.args.dataloader_num_workers
        return StepLoader(
            self.train_dataset,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=workers > 0,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),  # transformers < 5.23
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.timer.mark("other")
        self._mark("waiting for its batch")
        batches = [batch_or_error(next(epoch_iterator))]
        self.timer.mark("data")
        return batches, None

    def num_examples(self, dataloader: DataLoader) -> int:
        return len(dataloader) * self.args.global_batch_size

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0  # not estimated

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        counted = self.args.include_num_input_tokens_seen
        if counted != "no":
            padding = inputs.padded_tokens - inputs.encoded_tokens if counted == "all" else 0
            tokens = torch.tensor(inputs.real_tokens + padding, device=self.args.device)
            self.state.num_input_tokens_seen += int(all_reduce_sum(tokens))

    # ---- the step

    def training_step(self, model, inputs: Batch, num_items_in_batch=None) -> Tensor:
        """One global batch. Returns this rank's share of the loss times the ranks: their mean is the global loss."""
        model.train()
        step, rows = self.state.global_step + 1, inputs.rows
        place = f"; data set {inputs.dataset}, rows {', '.join(rows[:4])}{', ...' if len(rows) > 4 else ''}"
        self._mark("pass_1", place)
        self.stopped = bool(all_reduce_max(self.signals.received)[0])
        self.tokens.update(real=inputs.real_tokens, encoded=inputs.encoded_tokens, padded=inputs.padded_tokens)
        batch = inputs.to(self.args.device)

        def mark(part: str) -> None:
            self.timer.mark(part)
            self._mark(f"after {part}", place)

        sizes = ((chunk["input_ids"].numel(), len(chunk["lengths"])) for chunk in batch.chunks)
        self.memory.reserved = max(varlen_backward_bytes(self.embedder.config, *size) for size in sizes)
        engine = engine_for(model, self._sync_each_chunk)
        terms = two_pass_step(
            engine, batch.chunks, lambda vectors: self.objective(vectors, batch.contrastive), mark, self.memory
        )
        self.meter.add(terms, inputs.dataset)
        dataset = inputs.dataset if len(self.train_dataset.records) > 1 else None
        self.meter.add_left_out(getattr(self.objective, "left_out", {}), self.args.global_batch_size, dataset)
        loss = torch.stack(list(terms.values())).sum()
        self.finite.loss(step, loss, inputs.dataset, rows)
        self.adapter_gradients.check(model, max(group["lr"] for group in self.optimizer.param_groups))
        engine.step()
        return loss * self.args.world_size

    @cached_property
    def _sync_each_chunk(self) -> bool:
        """Whether an engine that shards the gradient sums it over the ranks after each chunk."""
        if self.args.sync_each_chunk != "auto":
            return self.args.sync_each_chunk == "yes"
        shards = engine_name(self.args) in ("fsdp2", "zero2", "zero3")
        large = shards and gradient_is_large(self.model_wrapped, self.args.device)
        if large:
            log.info("gradient: summed over the ranks after each chunk; the whole one takes over a quarter of a GPU")
        return large

    def _out_of_memory(self, error: BaseException) -> str:
        """What failed, and which flags help."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        ways = [f"lower --chunk_tokens (now {self.args.chunk_tokens})"]
        ways += ["--activation_memory 0"] * (self.args.activation_memory != "0")
        if not self.args.gradient_checkpointing:
            instead = ["--selective_checkpointing False "] * self.args.selective_checkpointing
            ways.append("".join([*instead, "--gradient_checkpointing True"]))
        ways += ["--sync_each_chunk yes"] * (sharded and not self._sync_each_chunk)
        ways += ["--fsdp, which shards the model"] * (self.args.world_size > 1 and not sharded)
        return f"{first_line(error).rstrip('.')}. Try: {', or '.join(ways)}"

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.finite.gradient_norm(self.state.global_step + 1, norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.finite.check()
            logs |= self.meter.read() | self._speed()
            if self.tuning.projection_learning_rate is not None:
                logs["learning_rate/projection"] = self.projection_rate
        if "train_loss" in logs:  # the last entry
            self._correct_summary(logs)
        super().log(logs, start_time)

    def _correct_summary(self, logs: dict[str, float]) -> None:
        """The last entry of the log, which Hugging Face makes for batches of its own data loader."""
        logs.pop("total_flos", None)  # not estimated
        queries = (self.state.global_step - self.first_step) * self.args.global_batch_size
        logs["train_samples_per_second"] = round(queries / max(logs["train_runtime"], 1e-4), 3)
        # Of the steps after the last log line, each rank has its own loss.
        mine = torch.tensor(logs["train_loss"], dtype=torch.float64)
        logs["train_loss"] = all_reduce_sum(mine.to(self.args.device)).item() / self.args.world_size

    def _speed(self) -> dict[str, float]:
        """Tokens per second over all ranks, and the share that is not padding; the first rank's memory and time."""
        seconds = self.timer.read()
        seconds.pop(EVALUATION, None)
        total = sum(seconds.values()) or 1.0
        counts = [self.tokens[name] for name in ("real", "encoded", "padded")]
        real, encoded, padded = all_reduce_sum(torch.tensor(counts, device=self.args.device)).tolist()
        self.tokens.clear()
        cuda = self.args.device.type == "cuda"
        memory = {"peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if cuda else {}
        return {
            "tokens_per_second": round(real / total, 1),
            "real_token_share": round(encoded / max(padded, 1), 4),
            **memory,
            **{f"time_share/{part}": round(seconds[part] / total, 4) for part in TIMED_PARTS},
        }


class TrainingCallback(TrainerCallback):
    """Runs the trainer's checks in the loop: probe before the first step, save early, stop when asked to."""

    def __init__(self, trainer: EmbeddingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.first_step = state.global_step
        state.compute_steps(args, state.max_steps)  # a resumed run may have another --save_steps and --logging_steps
        found = self.trainer.probe()
        if self.trainer.tuning.use_muon:
            weights = self.trainer.embedder.named_parameters()
            log.info(describe_split({name: weight.shape for name, weight in weights if weight.requires_grad}))
        log.info("attention probe: passed (%s)", ", ".join(f"{name} {value:.0e}" for name, value in found.items()))

    def on_train_end(self, args, state, control, **kwargs):
        if self.trainer.rounding:
            self.trainer.rounding.still.end_step(last=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.average:
            self.trainer.average.update(state.global_step)
        # A save that cannot work fails after the first step, not hours later.
        first = state.global_step == 1 and args.save_strategy != "no"
        control.should_save = control.should_save or first or self.trainer.stopped
        control.should_training_stop = control.should_training_stop or self.trainer.stopped
        if self.trainer.evaluation and state.global_step >= state.max_steps:
            control.should_evaluate = control.should_evaluate or args.eval_strategy != "epoch"  # it follows
