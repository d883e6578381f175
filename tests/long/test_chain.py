"""The chain of scripts/training/chain.sh: every stage, and the same call again."""

import os
import subprocess

import pytest
from helpers import ROOT, make_model_folder, write_jsonl

pytestmark = pytest.mark.long
FLAGS = "--global_batch_size 8 --max_steps 2 --query_max_len 32 --passage_max_len 48 --train_group_size 2"


def test_the_chain_from_weak_pairs_to_a_merged_model(qwen3, tmp_path):
    for seed, name in enumerate(("weak", "pairs", "eval")):
        write_jsonl(tmp_path / f"{name}.jsonl", rows=40, negatives=0, seed=seed)
    make_model_folder(qwen3, tmp_path / "miner")
    given = {"BASE": qwen3, "WEAK_DATA": "weak.jsonl", "TRAIN_DATA": "pairs.jsonl", "EVAL_DATA": "eval.jsonl"}
    given |= {
        "MINER": "miner",
        "OUTPUT_DIR": "out",
        "GPUS": "none",
        "CHUNK_TOKENS": "512",
        "PYTHON": ROOT / ".venv/bin/python",
    }
    given |= {"MINE_FLAGS": "--num_negatives 1 --relative_margin none", "FILTER_FLAGS": "--relative_margin none"}
    given |= {"WEAK_FLAGS": FLAGS, "TUNE_FLAGS": FLAGS, "DISTILL_FLAGS": f"{FLAGS} --teacher_weight 1"}

    def chain(**more) -> subprocess.CompletedProcess:
        environment = os.environ | {name: str(value) for name, value in (given | more).items()}
        command = ["bash", ROOT / "scripts/training/chain.sh"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)

    done = chain()
    assert done.returncode == 0, done.stderr[-3000:]
    stages = [line.removeprefix("chain: ") for line in done.stdout.splitlines() if line.startswith("chain: ")]
    assert stages == [
        f"weak against {qwen3}",
        "tuned against weak",
        "distilled against tuned",
        "merged against distilled",
        f"merged, in all against {qwen3}",
    ]
    assert (tmp_path / "out/merged/modules.json").is_file()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    again = chain()
    assert again.returncode == 0, again.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")} == written
    refused = chain(MINER="")
    assert (refused.returncode, refused.stderr) == (2, "chain: error: MINER is empty; set it in the call\n"), "control"
