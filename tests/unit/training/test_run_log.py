"""What a run says: a line that a person reads, and one JSON object a line for programs."""

import json
import re
from types import SimpleNamespace

import pytest

from gritlm.training.run_log import LOG_FILE, RunLog, log, set_up_logging


@pytest.fixture
def state():
    return SimpleNamespace(global_step=4, max_steps=10, is_world_process_zero=True)


LOGS = {"loss": 1.5, "info_nce": 1.5, "grad_norm": 2.0, "learning_rate": 2e-5, "tokens_per_second": 12345.6}


def test_a_log_entry_is_one_line_and_one_object(tmp_path, state, capsys):
    set_up_logging(first_rank=True)
    run_log = RunLog(tmp_path)
    state.global_step = 2
    run_log.on_train_begin(None, state, None)
    state.global_step = 4
    run_log.on_log(None, state, None, logs=LOGS)
    (line,) = capsys.readouterr().out.splitlines()
    wanted = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO step 4/10  loss 1\.5000  lr 2\.00e-05  grad_norm 2\.000  "
    wanted += r"12,346 tokens/s  left 0:00:00"
    assert re.fullmatch(wanted, line), line
    entry = json.loads((tmp_path / LOG_FILE).read_text())
    assert entry.pop("time")
    assert entry == {"step": 4, **LOGS}


def test_several_terms_are_shown_by_name(tmp_path, state, capsys):
    set_up_logging(first_rank=True)
    run_log = RunLog(tmp_path)
    run_log.on_train_begin(None, state, None)
    run_log.on_log(None, state, None, logs=LOGS | {"spread_out": 0.25, "loss/nq": 1.5, "time_share/data": 0.1})
    line = capsys.readouterr().out
    assert "info_nce 1.5000  spread_out 0.2500  lr" in line
    assert "nq" not in line and "time_share" not in line


def test_a_resumed_run_appends_what_is_new(tmp_path, state):
    """It was killed after step 4, while it wrote the entry of step 5, and goes on after step 3."""

    def report(*steps: int) -> None:
        run_log = RunLog(tmp_path)
        run_log.on_train_begin(None, state, None)
        for state.global_step in steps:
            run_log.on_log(None, state, None, logs=LOGS)
        run_log.on_log(None, state, None, logs={"train_loss": 1.0})

    report(3, 4)
    with open(tmp_path / LOG_FILE, "a") as out:
        out.write('{"step": 5, "loss')
    report(4, 5)
    entries = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [(entry["step"], "loss" in entry) for entry in entries] == [
        (3, True),
        (4, True),
        (4, False),
        (5, True),
        (5, False),
    ]


def test_other_ranks_are_silent(tmp_path, state, capsys):
    set_up_logging(first_rank=False)
    log.info("nothing")
    log.warning("something is wrong")
    state.is_world_process_zero = False
    RunLog(tmp_path).on_log(None, state, None, logs=LOGS)
    assert capsys.readouterr().out.endswith("WARNING something is wrong\n")
    assert not (tmp_path / LOG_FILE).exists()
