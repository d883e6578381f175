"""`gritlm train` with an eye on it: writes the rows of every step to a file, and plants a fault in one rank's step.

usage: driver.py ROWS_FILE FAULT flags of gritlm train ...

FAULT is "-", or FAULT:STEP[:RANK]: oom (out of memory), kill (like kill -9), kill_evaluating (within an evaluation),
stop (SIGUSR1 to itself), sleep (for ever, before the step), freeze (SIGSTOP), nan (as the loss), slow (every step, for
a time to be killed in), fill (the disk, but for 200 kB), count (no fault: says how often the first layer has been
called, whether autocast kept its copies of the weights meanwhile, and how far the vectors that reach the loss are off
unit length).

Every run says whether its steps have drawn from the global random generators.
With --deepspeed or --fsdp, accelerate is told that these CPU ranks are GPU ranks, which it asks for; all else is real.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import transformers
from accelerate import DistributedType, PartialState
from transformers import TrainerCallback

from gritlm.cli import exit_rank, run_verb
from gritlm.training import train
from gritlm.training.state_files import random_states

rows_file = sys.argv[1]
fault, at_step, on_rank = [*sys.argv[2].split(":"), "0", "0"][:3]

if "--deepspeed" in sys.argv or "--fsdp" in sys.argv:
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def random_numbers() -> tuple:
    """The state of the global random generators, in a form that compares."""
    states = random_states(torch.device("cpu"))
    return states["python"], states["numpy"][1].tolist(), states["torch"].tolist()


def is_due(name: str, step: int) -> bool:
    return fault == name and step == int(at_step) and os.environ.get("RANK", "0") == on_rank


class Watched(train.EmbeddingTrainer):
    def __init__(self, model, args, objective, **kwargs):
        super().__init__(model, args, self.watched(objective), **kwargs)
        self.add_callback(AtStepEnd())
        self.calls, self.copies_kept, self.off = 0, False, 0.0
        if fault == "count":
            self.model.backbone.layers[0].input_layernorm.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.calls += 1
        self.copies_kept |= torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()

    def watched(self, objective):
        """The objective, with the fault of this run."""

        def call(vectors, contrastive):
            step = self.state.global_step + 1
            if is_due("oom", step):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            if fault == "count":
                self.off = max(self.off, (vectors.detach().norm(dim=1) - 1).abs().max().item())
            terms = objective(vectors, contrastive)
            return {name: share * float("nan") for name, share in terms.items()} if is_due("nan", step) else terms

        return call

    def train(self, **kwargs):
        before = random_numbers()
        super().train(**kwargs)
        print("random generators:", "left alone" if random_numbers() == before else "drawn from")
        print(f"calls: {self.calls}; copies kept: {self.copies_kept}; off unit length: {self.off:.1e}")

    def get_batch_samples(self, *args, **kwargs):
        batches = super().get_batch_samples(*args, **kwargs)
        if is_due("sleep", self.state.global_step + 1):
            time.sleep(1000)
        if is_due("freeze", self.state.global_step + 1):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGSTOP)
        return batches

    def _mark(self, what, *place, **growing):
        if what.startswith("evaluating") and is_due("kill_evaluating", self.state.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        super()._mark(what, *place, **growing)

    def training_step(self, model, inputs, *args):
        self.calls *= self.state.global_step > 0  # those of the steps, not of the probe before
        with open(f"{rows_file}.{self.args.process_index}", "a") as out:
            out.write(json.dumps([inputs.dataset, inputs.rows]) + "\n")
        if fault == "slow":
            time.sleep(0.15)
        return super().training_step(model, inputs, *args)


class AtStepEnd(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if is_due("kill", state.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        if is_due("fill", state.global_step):  # another program does; lines of the log still fit
            free = shutil.disk_usage(args.output_dir).free
            Path(args.output_dir, "..", "ballast").write_bytes(bytes(free - 200_000))
        if is_due("stop", state.global_step):
            os.kill(os.getpid(), signal.SIGUSR1)


train.EmbeddingTrainer = Watched
exit_rank(run_verb(train.main, sys.argv[3:]))
