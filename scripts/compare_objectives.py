#!/usr/bin/env python3
"""Train one small model with each objective and seed, and compare held-out nDCG@10 with InfoNCE's.

usage: python scripts/compare_objectives.py FOLDER --model BASE --data ROWS --eval SET [SET ...] [--seeds 1 2 3]
       [--teacher VECTORS] [--flags "--max_steps 150 ..."] [--only VARIANT ...]

A run that has finished is not repeated, so the same command goes on after an interruption. ROWS is training data with
hard negatives and scores (gritlm mine --output_scores), VECTORS is what gritlm encode --rows wrote of it.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from gritlm.evaluation.results import read_results
from gritlm.evaluation.verdict import compare

VARIANTS = {  # flags beside those of every run; TEACHER is the folder of --teacher
    "info_nce": "",
    "batch 16": "--global_batch_size 16",
    "no hard negatives": "--train_group_size 1",
    "same_tower": "--same_tower True",
    "symmetric": "--symmetric True",
    "hard negatives only": "--in_batch_negatives False",
    "hardness": "--hardness_hard 5 --hardness_in_batch 9",
    "focal": "--focal_gamma 0.5",
    "margin 0.1": "--false_negative_margin 0.1",
    "relative margin": "--false_negative_relative_margin 0.05",
    "guide": "--guide_margin 0",
    "debiased": "--debiased True --tau_plus 0.01",
    "several positives": "--max_positives 4",
    "matryoshka": "--matryoshka_dims 96 48",
    "sigreg": "--sigreg_weight 0.05",
    "spread_out": "--spread_out_weight 1",
    "distill": "--distill_weight 1",
    "margin_mse": "--margin_mse_weight 1",
    "teacher vectors": "--teacher_weight 1",
    "teacher vectors alone": "--teacher_weight 1 --contrastive_weight 0",
    "teacher scores": "--teacher_weight 10 --teacher_loss scores",
    "mined batches": "--mined_batches TEACHER",
    "mined batches, guide": "--mined_batches TEACHER --guide_margin 0",
}


def train(folder: Path, flags: list[str]) -> Path:
    """Run `gritlm train` unless it has finished. Returns the results of its last evaluation."""
    done = sorted(folder.glob("evaluation/step-*.json"), key=lambda path: int(path.stem.split("-")[1]))
    if not (folder / "modules.json").exists():
        with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
            command = [sys.executable, "-m", "gritlm", "train", "--output_dir", str(folder), *flags]
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
        done = sorted(folder.glob("evaluation/step-*.json"), key=lambda path: int(path.stem.split("-")[1]))
    return done[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--teacher")
    parser.add_argument("--flags", default="")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    common = ["--model_name_or_path", args.model, "--train_data", args.data, "--eval_data", *args.eval]
    common += ["--eval_strategy", "no", "--save_strategy", "no", *shlex.split(args.flags)]
    results = {}
    for seed in args.seeds:
        for name in args.only:
            variant = VARIANTS[name]
            if "teacher_" in variant or "guide" in variant:
                variant += " --teacher_vectors TEACHER"
            if "TEACHER" in variant and not args.teacher:
                continue
            words = [args.teacher if word == "TEACHER" else word for word in shlex.split(variant)]
            flags = [*common, *words, "--seed", str(seed)]
            path = train(args.folder / f"{name.replace(' ', '_')}-{seed}", flags)
            results[name, seed] = read_results(path).sets
            mean = np.mean([found.metrics[found.main] for found in results[name, seed]])
            print(f"{name}, seed {seed}: {mean:.4f}", flush=True)
    print(
        "\n| objective | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | difference to InfoNCE, by seed |"
    )
    print("|" + "---|" * (len(args.seeds) + 2))
    for name in args.only:
        if (name, args.seeds[0]) not in results:
            continue
        verdicts = [compare(results["info_nce", seed], results[name, seed]).mean for seed in args.seeds]
        means = " | ".join(f"{verdict.tuned:.3f}" for verdict in verdicts)
        differences = ", ".join(f"{v.difference:+.3f} [{v.low:+.3f}, {v.high:+.3f}]" for v in verdicts)
        print(f"| {name} | {means} | {differences} |")


if __name__ == "__main__":
    main()
