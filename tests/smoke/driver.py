"""`gritlm train` with an eye on it: writes the rows of every step to a file, and can kill itself like kill -9.

usage: driver.py ROWS_FILE KILL_AT_STEP flags of gritlm train ...
"""

import json
import os
import signal
import sys

from transformers import TrainerCallback

from gritlm import train
from gritlm.errors import run_verb

rows_file, kill_at = sys.argv[1], int(sys.argv[2])


class Watched(train.EmbeddingTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(KillAtStep())

    def training_step(self, model, inputs, *args):
        with open(f"{rows_file}.{self.args.process_index}", "a") as out:
            out.write(json.dumps([inputs["dataset"], inputs["rows"]]) + "\n")
        return super().training_step(model, inputs, *args)


class KillAtStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


train.EmbeddingTrainer = Watched
sys.exit(run_verb(train.main, sys.argv[3:]))
