"""A whole study: its first run is stopped by a signal, SLURM does the rest, and the same call has nothing to do."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, words, write_jsonl
from safetensors.torch import load_file, save_file
from slurm_cluster import Cluster, missing

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(missing()), reason=missing())]
FILE = """OUTPUT_DIR=out TRAIN_DATA=pairs.jsonl PAIRS=(noise {base} noisy) SEEDS=({seeds}) BENCHMARKS=(eval.jsonl)
HRSA_TEXTS=texts.txt HRSA_FLAGS=(--max_length 32 --k 5)
TRAIN_FLAGS=(--global_batch_size 8 --query_max_len 32 --passage_max_len 48 --max_steps {steps} --save_steps 0.5)
"""


def test_stopped_then_on_slurm_then_done(qwen3, tmp_path):
    for seed, name in enumerate(("pairs", "eval")):
        write_jsonl(tmp_path / f"{name}.jsonl", rows=40, negatives=0, seed=seed)
    (tmp_path / "texts.txt").write_text("".join(f"{words(random.Random(k), 10, 30)}\n" for k in range(80)))
    shutil.copytree(qwen3, tmp_path / "noisy")
    weights = load_file(tmp_path / "noisy/model.safetensors")
    noisy = {name: w + 0.01 * torch.randn(w.shape, generator=torch.manual_seed(0)) for name, w in weights.items()}
    save_file(noisy, tmp_path / "noisy/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "study.sh").write_text(FILE.format(base=qwen3, seeds="1 2", steps=200))
    given = {"GPUS": "none", "CHUNK_TOKENS": "512", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    given |= {"HF_HUB_OFFLINE": "1"}
    command = ["bash", str(ROOT / "scripts/study.sh"), "study.sh"]

    # Seed 1 of the base is stopped after its first save.
    log = open(tmp_path / "log", "w")  # noqa: SIM115
    first = subprocess.Popen([*command, "train", "0"], cwd=tmp_path, env=os.environ | given, stdout=log, stderr=log)
    run = tmp_path / f"out/runs/{qwen3.name}-1"
    Cluster.wait(lambda: (run / "checkpoint-1").exists(), 120, "the first checkpoint")
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 75, (tmp_path / "log").read_text()[-3000:]
    assert json.loads((run / "run.json").read_text())["finished"] is False

    folder = tmp_path / "slurm"
    folder.mkdir()
    with Cluster(folder) as cluster:
        submitted = cluster("env", "--chdir", tmp_path, *command, SUBMIT="slurm", **given)
        assert "(train)" in submitted and "(hrsa)" in submitted, submitted
        cluster.wait(lambda: not cluster("squeue", "--noheader").split(), 300, "the end of all jobs")
    logs = {path.name: path.read_text() for path in (tmp_path / "out/logs").iterdir()}
    assert sorted(logs) == sorted(
        [f"{name}-{k}.log" for name in ("train", "evaluate", "hrsa") for k in range(4 if name != "hrsa" else 2)]
        + ["table-0.log"]
    ), logs
    assert "resuming from" in logs["train-0.log"] and "resuming from" not in logs["train-1.log"], "control"
    table = json.loads((tmp_path / "out/table.json").read_text())
    (mean, _) = table["scores"]
    assert (len(mean["base"]), mean["low"] <= mean["mean"] <= mean["high"]) == (2, True)
    assert {row["metric"] for row in table["inside"]} >= {"h_inv", "cka"}
    assert all(row["pair before"]["value"] > 0.9 for row in table["inside"] if row["metric"] == "h_inv")

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    again = subprocess.run(command, cwd=tmp_path, env=os.environ | given, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "done: train 4 of 4, evaluate 4 of 4, hrsa 2 of 2 parts" in again.stdout
    changed = {path.name for path, when in written.items() if path.stat().st_mtime_ns != when}
    assert changed == {"table.md", "table.json", "table.tsv"}
