"""The main job under a real SLURM: two nodes, preempted by a signal, requeued by itself, undisturbed in the end."""

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


def test_an_array_submitted_from_elsewhere(cluster, settings, tmp_path, monkeypatch):
    """The script finds its checkout, relative paths start at the folder of sbatch, and each task has a folder."""
    monkeypatch.chdir(tmp_path)
    env = {name: value for name, value in settings.items() if name != "SLURM_SUBMIT_DIR"}
    env |= {"TRAIN_DATA": "pairs.jsonl", "MAX_STEPS": 2}
    options = ["--parsable", "--nodes", "1", "--array", "0-1", "--output", "%a.log"]
    job = cluster("sbatch", *options, ROOT / SCRIPT, "--disable_tqdm", "True", **env).strip()
    cluster.wait(lambda: not cluster("squeue", "--noheader", "--jobs", job).split(), 180, "the tasks")
    logs = [(tmp_path / f"{task}.log").read_text() for task in (0, 1)]
    assert all("model saved to outputs/" in log for log in logs), logs
    name = f"{settings['MODEL_NAME_OR_PATH'].name}-pairs.jsonl"
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == [f"{name}-0", f"{name}-1"]
