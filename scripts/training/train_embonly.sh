#!/usr/bin/env bash
#SBATCH --job-name=gritlm
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# Train an embedding model. Edit the variables, or set them in the call:
#   MODEL_NAME_OR_PATH=Qwen/Qwen3-0.6B TRAIN_DATA=data/ bash scripts/training/train_embonly.sh --seed 1
# The same file is a SLURM job. 300 s before its time limit it saves and requeues itself:
#   sbatch --nodes 2 --gpus-per-node 8 --exclusive --mem 0 --time 12:00:00 scripts/training/train_embonly.sh
#   RECIPE=paper/qwen3-0.6b TRAIN_DATA=data/ bash scripts/training/train_embonly.sh     a file of recipes/
# Without model and data it trains the embedded default, which needs no download. More flags: gritlm train --help
# Relative paths start at the folder of the call. PYTHON=/path/to/python chooses the Python.
set -euo pipefail
fail() { echo "train_embonly: error: $*" >&2; exit 2; }
root=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; then slurm=yes; else slurm=; fi
if [ -n "$slurm" ] && [ ! -f "$root/scripts/training/node.py" ]; then  # sbatch runs a copy of this file
  cd "${SLURM_SUBMIT_DIR:-.}"
  root=$PWD
  [ -f scripts/training/node.py ] || root=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null |
    sed -n 's|^ *Command=\(.*\)/scripts/training/[^/]*\.sh.*|\1|p' | head -n 1) || true
fi
[ -f "$root/scripts/training/node.py" ] || fail "found no scripts/training/node.py in ${root:-$PWD}; run this file in" \
  "its checkout, or submit from the repository's root"

RECIPE=${RECIPE:-}                           # values for what the call leaves open: a file of recipes/, or a path
MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-}   # a decoder LLM or an encoder: a hub name or a folder
TRAIN_DATA=${TRAIN_DATA:-}                   # .jsonl, .jsonl.gz, .parquet, or a folder of them
EVAL_DATA=${EVAL_DATA:-}                     # evaluate on it while training: a BEIR folder, a file, a folder of them
OUTPUT_DIR=${OUTPUT_DIR:-}                   # empty: outputs/<model>-<data>
RECIPE_FLAGS=()
[ -n "$RECIPE$MODEL_NAME_OR_PATH$TRAIN_DATA" ] || RECIPE=quickstart
if [ -n "$RECIPE" ]; then
  recipe=$root/scripts/training/recipes/${RECIPE%.sh}.sh
  [ -f "$recipe" ] || recipe=$RECIPE
  [ -f "$recipe" ] || fail "RECIPE=$RECIPE: no such file, and no such name in scripts/training/recipes"
  source "$recipe"
fi

GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-2048} # queries per step, over all GPUs
TRAIN_GROUP_SIZE=${TRAIN_GROUP_SIZE:-4}      # passages per query: 1 positive, the rest hard negatives
QUERY_MAX_LEN=${QUERY_MAX_LEN:-}             # tokens, instruction included; empty: as the model was trained, else 512
PASSAGE_MAX_LEN=${PASSAGE_MAX_LEN:-}         # tokens; empty: the same
LEARNING_RATE=${LEARNING_RATE:-2e-5}
TEMPERATURE=${TEMPERATURE:-0.02}
NUM_TRAIN_EPOCHS=${NUM_TRAIN_EPOCHS:-1}
MAX_STEPS=${MAX_STEPS:--1}                   # above 0: replaces the epochs
GPUS=${GPUS:-}                               # for example 0,1,2,3; empty: all; none: the CPU
CHUNK_TOKENS=${CHUNK_TOKENS:-}               # GradCache: tokens per chunk; empty: 16384 on GPUs, 2048 on the CPU
MIN_FREE_GPU_PERCENT=${MIN_FREE_GPU_PERCENT:-90}
EXTRA_FLAGS=()                               # for example (--pooling_method lasttoken --report_to wandb)

# ---- end of the settings
[ -z "$MODEL_NAME_OR_PATH" ] || [ -n "$TRAIN_DATA" ] || fail "TRAIN_DATA is empty; set it with MODEL_NAME_OR_PATH"
[ -n "$MODEL_NAME_OR_PATH" ] || [ -z "$TRAIN_DATA" ] || fail "MODEL_NAME_OR_PATH is empty; set it with TRAIN_DATA"
[ -z "$TRAIN_DATA" ] || [ -e "$TRAIN_DATA" ] || fail "TRAIN_DATA=$TRAIN_DATA: no such file or folder"
[ -z "$EVAL_DATA" ] || [ -e "$EVAL_DATA" ] || fail "EVAL_DATA=$EVAL_DATA: no such file or folder"
source "$root/scripts/training/machine.sh"
choose_python
count_gpus
if [ $processes -gt 0 ]; then
  device=(--bf16 True --gradient_checkpointing True --chunk_tokens "${CHUNK_TOKENS:-16384}")
else
  processes=1
  device=(--use_cpu True --dataloader_num_workers 1 --chunk_tokens "${CHUNK_TOKENS:-2048}")
fi

task=
if [ -z "$MODEL_NAME_OR_PATH" ]; then
  task=outputs/quickstart-task
  # The file is written last. Only to see it, Python would import torch and transformers for 4 s.
  [ -f $task/held_out/qrels/test.tsv ] || "$python" -m gritlm quickstart prepare --folder $task
  MODEL_NAME_OR_PATH=$task/base TRAIN_DATA=$task/train.jsonl EVAL_DATA=${EVAL_DATA:-$task/held_out}
  if [ -z "$OUTPUT_DIR" ]; then  # resume an interrupted run; never touch a finished one
    OUTPUT_DIR=outputs/quickstart; number=1
    while grep -q '"finished": true' "$OUTPUT_DIR/run.json" 2>/dev/null; do
      number=$((number + 1)); OUTPUT_DIR=outputs/quickstart-$number
    done
  fi
fi
name=$(basename "$MODEL_NAME_OR_PATH")-$(basename "$TRAIN_DATA")${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/$name}

flags=(
  --model_name_or_path "$MODEL_NAME_OR_PATH" --train_data "$TRAIN_DATA" --output_dir "$OUTPUT_DIR"
  ${EVAL_DATA:+--eval_data "$EVAL_DATA"}
  --global_batch_size "$GLOBAL_BATCH_SIZE" --train_group_size "$TRAIN_GROUP_SIZE"
  ${QUERY_MAX_LEN:+--query_max_len "$QUERY_MAX_LEN"} ${PASSAGE_MAX_LEN:+--passage_max_len "$PASSAGE_MAX_LEN"}
  --learning_rate "$LEARNING_RATE" --temperature "$TEMPERATURE"
  --num_train_epochs "$NUM_TRAIN_EPOCHS" --max_steps "$MAX_STEPS"
  "${device[@]}" ${RECIPE_FLAGS[@]+"${RECIPE_FLAGS[@]}"} ${EXTRA_FLAGS[@]+"${EXTRA_FLAGS[@]}"} "$@"
)
find_nodes
# One quick process checks flags, paths and data before any GPU is used. An error is one line, with exit code 2.
CUDA_VISIBLE_DEVICES= "$python" -m gritlm plan "${flags[@]}" --ranks $((nodes * processes)) >/dev/null

# SIGUSR1 (the time limit is near), SIGTERM (preemption) and SIGHUP (a closed terminal) reach the ranks, which save and
# end. Ctrl-C aborts. It goes on as SIGUSR2, since SIGINT may be ignored where nohup or another script started this one.
${launch[@]+"${launch[@]}"} "$python" "$root/scripts/training/node.py" -m torch.distributed.run "${where[@]}" \
  --nproc-per-node "$processes" -m gritlm train "${flags[@]}" &
child=$!
terminated=
pass_on() { kill "-$1" $child 2>/dev/null || true; }
trap 'pass_on USR1' USR1
trap 'terminated=yes; pass_on TERM' TERM
trap 'terminated=yes; pass_on HUP' HUP
trap 'pass_on USR2' INT
while kill -0 $child 2>/dev/null; do wait $child || true; done
code=0; wait $child || code=$?

# 75: asked to stop before the ranks started. 0 and unfinished: asked to stop, and saved.
if [ $code = 75 ] || { [ $code = 0 ] && grep -q '"finished": false' "$OUTPUT_DIR/run.json" 2>/dev/null; }; then
  # After SIGTERM the job is cancelled, or it is preempted and SLURM requeues it.
  if [ -z "$slurm" ] || [ -n "$terminated" ]; then echo "train_embonly: stopped; the same command resumes it"; exit 75; fi
  echo "train_embonly: requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID" && exit
  echo "train_embonly: error: saved, and scontrol cannot requeue job $SLURM_JOB_ID; submit the same command again" >&2
  exit 75
fi
[ $code = 0 ] || exit $code
[ -z "$task" ] || "$python" -m gritlm quickstart report --folder "$task" --model "$OUTPUT_DIR"
