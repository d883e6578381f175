#!/usr/bin/env bash
# A model's whole life: weak pairs, mined and filtered negatives, fine-tuning, distillation, merging, evaluation.
#   BASE=Qwen/Qwen3-0.6B WEAK_DATA=weak/ TRAIN_DATA=pairs/ MINER=Qwen/Qwen3-Embedding-0.6B EVAL_DATA=eval/ \
#     OUTPUT_DIR=outputs/chain bash scripts/training/chain.sh
# The training stages are calls of train_embonly.sh, and its variables hold for each of them (GPUS, QUERY_MAX_LEN, ...).
# The same call goes on where it was interrupted. Each stage prints its gain on EVAL_DATA.
set -euo pipefail
fail() { echo "chain: error: $*" >&2; exit 2; }
root=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

BASE=${BASE:-}                     # Qwen2 or Qwen3: a hub name or a folder
WEAK_DATA=${WEAK_DATA:-}           # many pairs without negatives, such as titles and texts; empty: that stage is left out
TRAIN_DATA=${TRAIN_DATA:-}         # the pairs to mine negatives for
MINER=${MINER:-}                   # an embedding model
TEACHER=${TEACHER:-$MINER}         # an embedding model
EVAL_DATA=${EVAL_DATA:-}           # BEIR folders, files, or a folder of them
OUTPUT_DIR=${OUTPUT_DIR:-}
MINE_FLAGS=${MINE_FLAGS:---num_negatives 3}
FILTER_FLAGS=${FILTER_FLAGS:---min_positive 0.3}
WEAK_FLAGS=${WEAK_FLAGS:-}         # flags of gritlm train for one stage, such as --max_steps 1000
TUNE_FLAGS=${TUNE_FLAGS:-}
DISTILL_FLAGS=${DISTILL_FLAGS:---teacher_weight 1}
WEAK_RATE=${WEAK_RATE:-2e-5} TUNE_RATE=${TUNE_RATE:-2e-5} DISTILL_RATE=${DISTILL_RATE:-1e-5}

# ---- end of the settings
for name in BASE TRAIN_DATA MINER EVAL_DATA OUTPUT_DIR; do
  [ -n "${!name}" ] || fail "$name is empty; set it in the call"
done
GPUS=${GPUS:-}
source "$root/scripts/training/machine.sh"
choose_python
export PYTHON=$python
gritlm() { "$python" -m gritlm "$@"; }
mkdir -p "$OUTPUT_DIR"
OUTPUT_DIR=$(cd "$OUTPUT_DIR" && pwd)
last=$BASE

# train NAME DATA RATE FLAGS...: train the last model on, unless that is done, and make the result the last model.
train() {
  local name=$1 data=$2 rate=$3
  shift 3
  local folder=$OUTPUT_DIR/$name
  [ -f "$folder/modules.json" ] || MODEL_NAME_OR_PATH=$last TRAIN_DATA=$data OUTPUT_DIR=$folder LEARNING_RATE=$rate \
    EVAL_DATA= bash "$root/scripts/training/train_embonly.sh" "$@"
  gain "$name" "$folder"
}

# gain NAME FOLDER: compare a model with the last one, and make it the last one.
gain() {
  echo "chain: $1 against ${last#"$OUTPUT_DIR/"}"
  gritlm evaluate "$2" --benchmark $EVAL_DATA --against "$last" --output_folder "$OUTPUT_DIR/evaluation"
  last=$2
}

# Flags and files split at spaces: they are lists in one variable.
[ -z "$WEAK_DATA" ] || train weak "$WEAK_DATA" "$WEAK_RATE" --train_group_size 1 $WEAK_FLAGS
[ -e "$OUTPUT_DIR/mined" ] || gritlm mine "$TRAIN_DATA" "$OUTPUT_DIR/mined" --model "$MINER" --output_scores $MINE_FLAGS
[ -e "$OUTPUT_DIR/clean" ] ||
  gritlm filter "$OUTPUT_DIR/mined" "$OUTPUT_DIR/clean" --scores "$OUTPUT_DIR/mined" $FILTER_FLAGS
train tuned "$OUTPUT_DIR/clean" "$TUNE_RATE" $TUNE_FLAGS
tuned=$last
[ -e "$OUTPUT_DIR/teacher" ] || gritlm encode "$OUTPUT_DIR/clean" "$OUTPUT_DIR/teacher" --rows --model "$TEACHER"
train distilled "$OUTPUT_DIR/clean" "$DISTILL_RATE" --teacher_vectors "$OUTPUT_DIR/teacher" $DISTILL_FLAGS
[ -e "$OUTPUT_DIR/merged" ] || gritlm merge "$tuned" "$last" "$OUTPUT_DIR/merged" --method slerp
gain merged "$OUTPUT_DIR/merged"
last=$BASE
gain "merged, in all" "$OUTPUT_DIR/merged"
