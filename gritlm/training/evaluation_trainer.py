"""EvaluationTrainer: Hugging Face's evaluations, best model and early stopping, over this project's measures."""

import time
from typing import Any

import torch
from transformers import EarlyStoppingCallback

from gritlm.models.chunks import ChunkConfig
from gritlm.training.checkpoint_trainer import CheckpointTrainer
from gritlm.training.engines import engine_for
from gritlm.training.evaluation import RunEvaluation
from gritlm.training.meters import StepTimer
from gritlm.training.run_log import log
from gritlm.training.sharded_encoder import ShardedEncoder

EVALUATION = "evaluation"  # a part for the timer, which counts it to no step


class EvaluationTrainer(CheckpointTrainer):
    """Evaluates between steps. `EmbeddingTrainer` sets the timer.

    Attributes:
        evaluation: what evaluates the model, or None.
        first_step: the last step before this start.
    """

    timer: StepTimer
    control: Any  # Hugging Face's TrainerControl
    evaluation: RunEvaluation | None = None
    first_step = 0

    def set_up_evaluation(self, evaluation: RunEvaluation | None, chunking: ChunkConfig) -> None:
        """Prepare to evaluate, where there is something to evaluate on."""
        args, self.evaluation = self.args, evaluation
        if evaluation:
            width = self.embedder.embedding_dim
            self.encoder = ShardedEncoder(self.processing_class, chunking, width, args.device, self.watchdog.alive)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Evaluate the model as it is between two steps. All ranks call it."""
        step, began = self.state.global_step, time.perf_counter()
        if step == self.first_step > 0:  # the start of a resumed run: its first start has evaluated the base
            return {}
        assert self.evaluation is not None
        self.timer.mark("other")
        self.encoder.engine = engine_for(self.model_wrapped)
        self.model_wrapped.eval()
        # Compiled layers would be compiled once more for this.
        with torch.compiler.set_stance("force_eager"), self.published_weights():
            numbers, summary = self.evaluation(self.encoder, step, lambda what: self._mark(f"evaluating {what}"))
        self.model_wrapped.train()
        self._mark("evaluated")
        self.timer.mark(EVALUATION)
        numbers["eval_seconds"] = round(time.perf_counter() - began, 2)
        log.info("evaluation at step %d  %s  (%.1f s)", step, summary, numbers["eval_seconds"])
        self.log(numbers)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, numbers)
        return numbers

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Whether the metric is the best so far, or the run ends early.

        A best model that will be published is saved, and so is the model of an early end.
        """
        found = super()._determine_best_metric(metrics, trial)
        ends_early = self.control.should_training_stop and self.state.global_step < self.state.max_steps
        if ends_early or (found and self.args.load_best_model_at_end):
            self.control.should_save = self.args.save_strategy != "no"
        return found or ends_early


class EarlyStopping(EarlyStoppingCallback):
    """Hugging Face's callback. A resumed run goes on with its count, which checkpoints.py reads under this name."""

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        self.__dict__ |= saved.get("attributes", {})
