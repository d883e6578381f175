"""Folders of runs as `gritlm train` leaves them, with whatever a test wants in them."""

import json
from pathlib import Path
from typing import Any

EVIL = "<script>alert(1)</script>\"'&`|x` ](http://x) \u2028"


def write_run(folder: Path, steps: int = 3, log: str | None = None, **settings: Any) -> Path:
    """A run's folder: run.json, and log.jsonl with `steps` lines or with the given text."""
    folder.mkdir(parents=True)
    start = {
        "time": "2026-01-02T03:04:05+0000",
        "command": "gritlm train --seed 1",
        "ranks": 2,
        "device": "CPU",
        "versions": {"gritlm": "0.2.0", "torch": "2.13.0"},
        "given": {"seed": 1},
        "data sets": [
            {"name": "hard", "rows": 40, "fingerprint": "f1"},
            {"name": "plain", "rows": 8, "fingerprint": "f2"},
        ],
        "examples": ["examples, as tokenised", "  hard query, 3 tokens: [a ]b c"],
    }
    flags = {"seed": 1, "max_steps": 30, "learning_rate": 1e-3, "bf16": False, "data": ["40 rows, f1", "8 rows, f2"]}
    found = {
        "finished": True,
        "starts": [start],
        "flags": flags,
        "resolved": {key: value for key, value in flags.items() if key != "data"}
        | {"model_name_or_path": "org/base", "output_dir": str(folder)},
    }
    (folder / "run.json").write_text(json.dumps(found | settings))
    lines = "".join(json.dumps(log_entry(step)) + "\n" for step in range(1, steps + 1))
    (folder / "log.jsonl").write_text(lines if log is None else log)
    return folder


def log_entry(step: int, **more: Any) -> dict[str, Any]:
    parts = {"data": 0.1, "pass_1": 0.3, "loss": 0.1, "pass_2": 0.4, "optimizer": 0.05, "other": 0.05}
    return {
        "step": step,
        "time": f"2026-01-02T03:04:{step % 60:02}+0000",
        "loss": 3 / step,
        "grad_norm": 1.0 + step % 7,
        "learning_rate": 1e-3 / step,
        "info_nce": 2 / step,
        "matryoshka": 1 / step,
        f"loss/{('hard', 'plain')[step % 2]}": 3 / step,
        "tokens_per_second": 1000.0 + step,
        "real_token_share": 0.9,
        "epoch": step / 10,
        **{f"time_share/{part}": share for part, share in parts.items()},
        **more,
    }


def write_evaluation(folder: Path, step: int, value: float, **more: Any) -> None:
    retrieval = {
        "name": "hard_held_out",
        "kind": "retrieval",
        "main": "ndcg@10",
        "metrics": {"ndcg@10": value, "recall@10": value / 2},
        "values": [value - 0.1, value, value, value, value + 0.1],
        "gold": None,
        "space": {
            "alignment": 1.0,
            "uniformity_passages": -2.0,
            "positive_similarity": [0, 1, 4, 2],
            "negative_similarity": [5, 3, 1, 0],
        },
    }
    path = folder / "evaluation" / f"step-{step}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"format": 1, "about": {"eval_loss": 1 / (1 + step)}, "sets": [retrieval | more]}))
