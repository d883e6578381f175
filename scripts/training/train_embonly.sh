#!/usr/bin/env bash
#SBATCH --job-name=gritlm
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# Train an embedding model. Edit the variables, or set them in the call:
#   MODEL_NAME_OR_PATH=Qwen/Qwen3-0.6B TRAIN_DATA=data/ bash scripts/training/train_embonly.sh --seed 1
# The same file is a SLURM job, submitted from the repository's root. 300 s before its time limit it saves and requeues:
#   sbatch --nodes 2 --gpus-per-node 8 --exclusive --mem 0 --time 12:00:00 scripts/training/train_embonly.sh
# Without model and data it trains the embedded default, which needs no download. More flags: gritlm train --help
set -euo pipefail
fail() { echo "train_embonly: error: $*" >&2; exit 2; }
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; then slurm=yes; else slurm=; fi
# SLURM runs a copy of this file from another folder.
if [ -n "$slurm" ]; then cd "$SLURM_SUBMIT_DIR"; else cd "$(dirname "${BASH_SOURCE[0]}")/../.."; fi
[ -f scripts/training/node.sh ] || fail "found no scripts/training/node.sh in $PWD; submit from the repository's root"

MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-}   # Qwen2 or Qwen3: a hub name or a folder
TRAIN_DATA=${TRAIN_DATA:-}                   # .jsonl, .jsonl.gz, .parquet, or a folder of them
OUTPUT_DIR=${OUTPUT_DIR:-}                   # empty: outputs/<model>-<data>
[ -n "$MODEL_NAME_OR_PATH$TRAIN_DATA" ] || source scripts/training/recipes/quickstart.sh

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
bash scripts/setup.sh
python=.venv/bin/python

if [ "$GPUS" != none ] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  export CUDA_DEVICE_ORDER=PCI_BUS_ID  # the order of nvidia-smi
  [ -z "$GPUS" ] || export CUDA_VISIBLE_DEVICES=$GPUS
  query=(nvidia-smi --query-gpu=index,memory.free,memory.total --format=csv,noheader,nounits)
  [ -z "${CUDA_VISIBLE_DEVICES:-}" ] || query+=(-i "$CUDA_VISIBLE_DEVICES")
  processes=0
  while IFS=', ' read -r index free total; do
    processes=$((processes + 1))
    [ $((100 * free / total)) -ge "$MIN_FREE_GPU_PERCENT" ] || fail "GPU $index has $free of $total MiB free," \
      "wanted $MIN_FREE_GPU_PERCENT%; choose others with GPUS=..., or lower MIN_FREE_GPU_PERCENT"
  done < <("${query[@]}")
  [ "$processes" -gt 0 ] || fail "GPUS=$GPUS: nvidia-smi lists none of them"
  device=(--bf16 True --gradient_checkpointing True --chunk_tokens "${CHUNK_TOKENS:-16384}")
else
  [ -z "$GPUS" ] || [ "$GPUS" = none ] || fail "GPUS=$GPUS: found no GPU (nvidia-smi)"
  processes=1
  device=(--use_cpu True --dataloader_num_workers 1 --chunk_tokens "${CHUNK_TOKENS:-2048}")
fi

task=
if [ -z "$MODEL_NAME_OR_PATH" ]; then
  task=outputs/quickstart-task
  $python -m gritlm quickstart prepare --folder $task
  MODEL_NAME_OR_PATH=$task/base TRAIN_DATA=$task/train.jsonl
  if [ -z "$OUTPUT_DIR" ]; then  # resume an interrupted run; never touch a finished one
    OUTPUT_DIR=outputs/quickstart; number=1
    while grep -q '"finished": true' "$OUTPUT_DIR/run.json" 2>/dev/null; do
      number=$((number + 1)); OUTPUT_DIR=outputs/quickstart-$number
    done
  fi
fi
OUTPUT_DIR=${OUTPUT_DIR:-outputs/$(basename "$MODEL_NAME_OR_PATH")-$(basename "$TRAIN_DATA")}

flags=(
  --model_name_or_path "$MODEL_NAME_OR_PATH" --train_data "$TRAIN_DATA" --output_dir "$OUTPUT_DIR"
  --global_batch_size "$GLOBAL_BATCH_SIZE" --train_group_size "$TRAIN_GROUP_SIZE"
  ${QUERY_MAX_LEN:+--query_max_len "$QUERY_MAX_LEN"} ${PASSAGE_MAX_LEN:+--passage_max_len "$PASSAGE_MAX_LEN"}
  --learning_rate "$LEARNING_RATE" --temperature "$TEMPERATURE"
  --num_train_epochs "$NUM_TRAIN_EPOCHS" --max_steps "$MAX_STEPS"
  "${device[@]}" ${EXTRA_FLAGS[@]+"${EXTRA_FLAGS[@]}"} "$@"
)
nodes=1 launch=() head=localhost port=0
if [ -n "$slurm" ]; then
  nodes=$SLURM_NNODES
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  head=$(scontrol show node "$head" | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2)
  port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
  launch=(srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=1)
fi
# One quick process checks flags, paths and data before any GPU is used. An error is one line, with exit code 2.
CUDA_VISIBLE_DEVICES= $python -m gritlm plan "${flags[@]}" --ranks $((nodes * processes)) >/dev/null

# SIGUSR1 (the time limit is near) and SIGTERM (preemption) reach the workers, which save and exit. Ctrl-C aborts.
${launch[@]+"${launch[@]}"} bash scripts/training/node.sh "$head" "$port" "$nodes" "$processes" "${flags[@]}" &
child=$!
terminated=
trap 'kill -USR1 $child' USR1
trap 'terminated=yes; kill -TERM $child' TERM
trap 'kill -HUP $child' INT
while kill -0 $child 2>/dev/null; do wait $child || true; done
code=0; wait $child || code=$?

if [ $code = 0 ] && grep -q '"finished": false' "$OUTPUT_DIR/run.json" 2>/dev/null; then  # asked to stop, and saved
  # After SIGTERM the job is cancelled, or it is preempted and SLURM requeues it.
  if [ -z "$slurm" ] || [ -n "$terminated" ]; then echo "train_embonly: stopped; the same command resumes it"; exit 75; fi
  echo "train_embonly: requeueing job $SLURM_JOB_ID"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
[ $code = 0 ] || exit $code
[ -z "$task" ] || $python -m gritlm quickstart report --folder "$task" --model "$OUTPUT_DIR"
