#!/usr/bin/env python3
"""Train one small model with each variant and seed, and compare held-out nDCG@10 with the first variant's.

usage: python scripts/compare_runs.py FOLDER --table objectives|tuning --model BASE --data ROWS --eval SET [SET ...]
       [--seeds 1 2 3] [--teacher VECTORS] [--flags "--max_steps 150 ..."] [--only VARIANT ...]

What has finished is not repeated, so the same command goes on after an interruption. ROWS is training data, for the
objectives with hard negatives and scores (gritlm mine --output_scores); VECTORS is what gritlm encode --rows wrote of
it. A merged model of the tuning table is made from runs with all weights, a SLERP from a seed's and the next one's.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from gritlm.evaluation.results import read_results
from gritlm.evaluation.sets import SetResult
from gritlm.evaluation.verdict import compare

# Flags beside those of every run; TEACHER is the folder of --teacher.
OBJECTIVES = {
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
    "guide": "--teacher_vectors TEACHER --guide_margin 0",
    "debiased": "--debiased True --tau_plus 0.01",
    "several positives": "--max_positives 4",
    "matryoshka": "--matryoshka_dims 96 48",
    "sigreg": "--sigreg_weight 0.05",
    "spread_out": "--spread_out_weight 1",
    "distill": "--distill_weight 400",  # the factor T^2 of its loss is 1/400 at the default temperature
    "margin_mse": "--margin_mse_weight 10",
    "teacher vectors": "--teacher_vectors TEACHER --teacher_weight 1",
    "teacher vectors alone": "--teacher_vectors TEACHER --teacher_weight 1 --contrastive_weight 0",
    "teacher scores": "--teacher_vectors TEACHER --teacher_weight 10 --teacher_loss scores",
    "mined batches": "--mined_batches TEACHER",
    "mined batches, guide": "--mined_batches TEACHER --teacher_vectors TEACHER --guide_margin 0",
}
TUNING = {
    "full": "--save_strategy steps --save_steps 0.05 --save_total_limit 1 --merge_last 5",
    "lora": "--lora True --learning_rate 2e-4",
    "muon": "--use_muon True",
}
MERGED = {  # of the runs in {run} and {next}
    "average of the last 5 saves": "{run} --last 5",
    "slerp of two seeds": "{run} {next} --method slerp",
}
TABLES = {"objectives": OBJECTIVES, "tuning": TUNING | MERGED}


def gritlm(log: Path, verb: str, *words: str) -> None:
    with open(log, "a", encoding="utf-8") as file:
        command = [sys.executable, "-m", "gritlm", verb, *words]
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True)


def measured(log: Path, folder: Path, sets: list[str]) -> list[SetResult]:
    """The results of a model on the sets; what is measured already is read again."""
    results = folder.with_name(f"{folder.name}.results")
    if not (results / "done").exists():
        gritlm(log, "evaluate", str(folder), "--benchmark", *sets, "--output_folder", str(results))
        (results / "done").touch()
    return [found for path in sorted(results.rglob("*.json")) for found in read_results(path).sets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", choices=TABLES, default="objectives")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--teacher")
    parser.add_argument("--flags", default="")
    parser.add_argument("--only", nargs="+", help="these variants, and the first")
    args = parser.parse_args()
    variants = TABLES[args.table]
    first, *others = variants
    if unknown := sorted({*(args.only or ())} - {*variants}):
        parser.error(f"--only: found {', '.join(unknown)}, wanted some of {', '.join(variants)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    common = ["--model_name_or_path", args.model, "--train_data", args.data, "--save_strategy", "no"]
    common += shlex.split(args.flags)

    def folder_of(name: str, seed: int) -> Path:
        return args.folder / f"{name.replace(' ', '_')}-{seed}"

    results = {}
    for name in [first, *(name for name in others if name in (args.only or variants))]:  # runs before what merges them
        for place, seed in enumerate(args.seeds):
            folder, flags = folder_of(name, seed), variants[name]
            log, done = folder.with_name(f"{folder.name}.log"), (folder / "modules.json").exists()
            if name in MERGED and not done:
                after = args.seeds[(place + 1) % len(args.seeds)]
                runs = {key: shlex.quote(str(folder_of(first, n))) for key, n in (("run", seed), ("next", after))}
                gritlm(log, "merge", *shlex.split(flags.format(**runs)), str(folder))
            elif not done:
                if "TEACHER" in flags and not args.teacher:
                    continue
                own = [args.teacher if word == "TEACHER" else word for word in shlex.split(flags)]
                gritlm(log, "train", *common, *own, "--seed", str(seed), "--output_dir", str(folder))
            results[name, seed] = measured(log, folder, args.eval)
            mean = np.mean([found.metrics[found.main] for found in results[name, seed]])
            print(f"{name}, seed {seed}: {mean:.4f}", flush=True)
    seeds = " | ".join(f"seed {seed}" for seed in args.seeds)
    print(f"\n| {args.table} | {seeds} | difference to {first}, by seed |")
    print("|" + "---|" * (len(args.seeds) + 2))
    for name in dict.fromkeys(name for name, _ in results):
        verdicts = [compare(results[first, seed], results[name, seed]).mean for seed in args.seeds]
        means = " | ".join(f"{verdict.tuned:.3f}" for verdict in verdicts)
        differences = ", ".join(f"{v.difference:+.3f} [{v.low:+.3f}, {v.high:+.3f}]" for v in verdicts)
        print(f"| {name} | {means} | {differences} |")


if __name__ == "__main__":
    main()
