"""The main job under a real SLURM: two nodes, preempted by a signal, requeued by itself, undisturbed in the end."""

import subprocess
import time

import pytest
import torch
from helpers import ROOT, write_jsonl
from safetensors.torch import load_file
from slurm_cluster import Cluster, missing

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(missing()), reason=missing())]

SCRIPT = "scripts/training/train_embonly.sh"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def settings(qwen3_dropout, tmp_path) -> dict:
    write_jsonl(tmp_path / "pairs.jsonl", rows=40, negatives=2, seed=0)
    return {
        "MODEL_NAME_OR_PATH": qwen3_dropout,
        "TRAIN_DATA": tmp_path / "pairs.jsonl",
        "GPUS": "none",
        "GLOBAL_BATCH_SIZE": 8,
        "QUERY_MAX_LEN": 32,
        "PASSAGE_MAX_LEN": 48,
        "LEARNING_RATE": 1e-3,
        "HF_HUB_OFFLINE": 1,
        "OMP_NUM_THREADS": 1,
        "SLURM_SUBMIT_DIR": ROOT,
    }


def submit(cluster, settings, out, log, steps: int, *flags: str) -> str:
    flags += ("--save_steps", "0.5", "--logging_steps", "10", "--disable_tqdm", "True", "--dataloader_num_workers", "0")
    options = ["--parsable", "--nodes", "2", "--chdir", ROOT, "--output", log]
    return cluster("sbatch", *options, ROOT / SCRIPT, *flags, **settings, OUTPUT_DIR=out, MAX_STEPS=steps).strip()


def test_preempted_requeued_and_undisturbed(cluster, settings, tmp_path):
    logs = {name: tmp_path / f"{name}.log" for name in ("whole", "cut")}
    whole = submit(cluster, settings, tmp_path / "whole", logs["whole"], 300)
    cluster.wait(lambda: cluster.state(whole) in ("COMPLETED", "FAILED"), 240, "the undisturbed job")
    assert cluster.state(whole) == "COMPLETED", logs["whole"].read_text()[-3000:]
    assert "plan: 5 steps an epoch of 8 queries on 2 rank(s)" in logs["whole"].read_text()

    cut = submit(cluster, settings, tmp_path / "cut", logs["cut"], 300)
    cluster.wait(lambda: (tmp_path / "cut" / "checkpoint-1").exists(), 120, "the first checkpoint")
    time.sleep(1)
    cluster("scancel", "--signal=USR1", cut)  # as SLURM itself does some time before the limit
    cluster.wait(lambda: f"requeueing job {cut}" in logs["cut"].read_text(), 120, "the requeue")
    cluster.wait(lambda: cluster.state(cut) in ("COMPLETED", "FAILED"), 240, "the requeued job")
    log = logs["cut"].read_text()
    assert cluster.state(cut) == "COMPLETED", log[-3000:]
    assert "stopped by a signal after step" in log
    assert "resuming from" in log
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_cancelled_is_saved_and_not_requeued(cluster, settings, tmp_path):
    job = submit(cluster, settings, tmp_path / "out", tmp_path / "log", 3000)
    cluster.wait(lambda: (tmp_path / "out" / "checkpoint-1").exists(), 120, "the first checkpoint")
    cluster("scancel", job)
    cluster.wait(lambda: "CANCELLED" in cluster.state(job), 60, "the end")
    cluster.wait(lambda: len(list((tmp_path / "out").glob("checkpoint-*"))) > 1, 60, "the last save")
    time.sleep(8)
    assert "CANCELLED" in cluster.state(job)
    assert "requeueing" not in (tmp_path / "log").read_text()


def test_an_unreachable_rendezvous_is_said(settings):
    """As the second of two nodes, with nothing at the first one's port."""
    env = {name: str(value) for name, value in settings.items()} | {"SLURM_NODEID": "1", "RENDEZVOUS_SECONDS": "3"}
    command = ["bash", "scripts/training/node.sh", "127.0.0.1", "9", "2", "1", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, env=env | {"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "nothing answers at 127.0.0.1:9 after 3 s" in done.stderr


def test_submitted_from_elsewhere(tmp_path):
    (tmp_path / "copy.sh").write_text((ROOT / SCRIPT).read_text())
    env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", tmp_path / "copy.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "submit from the repository's root" in done.stderr
