#!/usr/bin/env bash
# The main job. Edit the variables, or set them on the call:
#   MODEL_NAME_OR_PATH=Qwen/Qwen3-0.6B TRAIN_DATA=data/ bash scripts/training/train_embonly.sh --seed 1
# With neither model nor data it trains the embedded default, which needs no download. More flags: gritlm train --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-}   # Qwen2 or Qwen3: a hub name or a folder
TRAIN_DATA=${TRAIN_DATA:-}                   # .jsonl, .jsonl.gz, .parquet, or a folder of them
OUTPUT_DIR=${OUTPUT_DIR:-}                   # empty: outputs/<model>-<data>
[ -n "$MODEL_NAME_OR_PATH$TRAIN_DATA" ] || source scripts/training/recipes/quickstart.sh

GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-2048} # queries per step, over all GPUs
TRAIN_GROUP_SIZE=${TRAIN_GROUP_SIZE:-4}      # passages per query: 1 positive, the rest hard negatives
QUERY_MAX_LEN=${QUERY_MAX_LEN:-512}          # tokens, instruction included
PASSAGE_MAX_LEN=${PASSAGE_MAX_LEN:-512}      # tokens
LEARNING_RATE=${LEARNING_RATE:-2e-5}
TEMPERATURE=${TEMPERATURE:-0.02}
NUM_TRAIN_EPOCHS=${NUM_TRAIN_EPOCHS:-1}
MAX_STEPS=${MAX_STEPS:--1}                   # above 0: in place of epochs
GPUS=${GPUS:-}                               # such as 0,1,2,3; empty: all; none: the CPU
CHUNK_TOKENS=${CHUNK_TOKENS:-}               # GradCache: tokens encoded at once; empty: 16384 on GPUs, 2048 on the CPU
MIN_FREE_GPU_PERCENT=${MIN_FREE_GPU_PERCENT:-90}
EXTRA_FLAGS=()                               # such as (--pooling_method lasttoken --report_to wandb)

# ---------------------------------------------------------------------------------------------------------------------
fail() { echo "train_embonly: error: $*" >&2; exit 2; }

[ -z "$MODEL_NAME_OR_PATH" ] || [ -n "$TRAIN_DATA" ] || fail "TRAIN_DATA is empty; set it beside MODEL_NAME_OR_PATH"
[ -n "$MODEL_NAME_OR_PATH" ] || [ -z "$TRAIN_DATA" ] || fail "MODEL_NAME_OR_PATH is empty; set it beside TRAIN_DATA"
[ -z "$TRAIN_DATA" ] || [ -e "$TRAIN_DATA" ] || fail "TRAIN_DATA=$TRAIN_DATA: no such file or folder"
bash scripts/setup.sh
python=.venv/bin/python

if [ "$GPUS" != none ] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  [ -z "$GPUS" ] || export CUDA_VISIBLE_DEVICES=$GPUS
  query=(nvidia-smi --query-gpu=index,memory.free,memory.total --format=csv,noheader,nounits)
  [ -z "${CUDA_VISIBLE_DEVICES:-}" ] || query+=(-i "$CUDA_VISIBLE_DEVICES")
  processes=0
  while IFS=', ' read -r index free total; do
    processes=$((processes + 1))
    [ $((100 * free / total)) -ge "$MIN_FREE_GPU_PERCENT" ] || fail "GPU $index has $free of $total MiB free," \
      "wanted $MIN_FREE_GPU_PERCENT%; choose others with GPUS=..., or lower MIN_FREE_GPU_PERCENT"
  done < <("${query[@]}")
  [ "$processes" -gt 0 ] || fail "GPUS=$GPUS: nvidia-smi knows none of them"
  device=(--bf16 True --gradient_checkpointing True --chunk_tokens "${CHUNK_TOKENS:-16384}")
else
  [ -z "$GPUS" ] || [ "$GPUS" = none ] || fail "GPUS=$GPUS: found no GPU (nvidia-smi)"
  processes=1
  device=(--use_cpu True --dataloader_num_workers 1 --chunk_tokens "${CHUNK_TOKENS:-2048}")
fi

task=
if [ -z "$MODEL_NAME_OR_PATH" ]; then
  task=outputs/quickstart-task
  $python -m gritlm.quickstart prepare --folder $task
  MODEL_NAME_OR_PATH=$task/base TRAIN_DATA=$task/train.jsonl
  if [ -z "$OUTPUT_DIR" ]; then  # go on where a run was cut off; never touch a finished one
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
  --query_max_len "$QUERY_MAX_LEN" --passage_max_len "$PASSAGE_MAX_LEN"
  --learning_rate "$LEARNING_RATE" --temperature "$TEMPERATURE"
  --num_train_epochs "$NUM_TRAIN_EPOCHS" --max_steps "$MAX_STEPS"
  "${device[@]}" ${EXTRA_FLAGS[@]+"${EXTRA_FLAGS[@]}"} "$@"
)
# Flags, paths and data are checked by one quick process before any GPU is touched: one clear line, exit code 2.
CUDA_VISIBLE_DEVICES= $python -m gritlm.plan "${flags[@]}" --ranks "$processes" >/dev/null
$python -m torch.distributed.run --standalone --nproc_per_node "$processes" -m gritlm.train "${flags[@]}"
[ -z "$task" ] || $python -m gritlm.quickstart report --folder "$task" --model "$OUTPUT_DIR"
