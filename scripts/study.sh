#!/usr/bin/env bash
# A study of (base, reasoning) pairs: train both models with one recipe and several seeds, evaluate them, compare their
# states before and after training (gritlm hrsa), and print the table of differences.
#   bash scripts/study.sh scripts/studies/paper.sh                    here, one part after another
#   SUBMIT=slurm bash scripts/study.sh scripts/studies/paper.sh       as SLURM arrays that wait for one another
#   bash scripts/study.sh FILE train|evaluate|hrsa|table [NUMBER]     the parts of one stage, or one of them
# The same call goes on after an interruption: a part that is done is not done again. docs/study.md explains the file.
set -euo pipefail
fail() { echo "study: error: $*" >&2; exit 2; }
root=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
study=${1:-} stage=${2:-all} number=${3:-${SLURM_ARRAY_TASK_ID:-}} GPUS=${GPUS:-} SUBMIT=${SUBMIT:-}
[ -f "$study" ] || fail "found ${study:-no study file}, wanted a file such as scripts/studies/small.sh"
case $stage in all | train | evaluate | hrsa | table) ;; *) fail "found the stage $stage, wanted train, evaluate, hrsa or table" ;; esac
case $number in *[!0-9]*) fail "found the part $number, wanted a number" ;; esac
case $SUBMIT in '' | slurm) ;; *) fail "SUBMIT=$SUBMIT: wanted slurm, or nothing" ;; esac
source "$root/scripts/training/machine.sh"
choose_python
export PYTHON=$python

# What a study file sets. It may also make the files that it names, with $python and $root.
OUTPUT_DIR=${OUTPUT_DIR:-}                    # a folder of its own
PAIRS=()                                      # three words for each pair: its name, the base, the reasoning model
RECIPE=${RECIPE:-}                            # of all models: a file of scripts/training/recipes, or a path
TRAIN_DATA=${TRAIN_DATA:-}
SEEDS=(1 2 3)
BENCHMARKS=()                                 # each a name or a path for gritlm evaluate --benchmark
HRSA_TEXTS=${HRSA_TEXTS:-}                    # empty: the stage hrsa is left out
EQUIVALENCE_MARGIN=${EQUIVALENCE_MARGIN:-0.5} # points of Mean(Task)
TRAIN_FLAGS=() EVAL_FLAGS=() HRSA_FLAGS=()    # more flags of the commands
SBATCH_FLAGS=() SBATCH_TRAIN=() SBATCH_EVALUATE=() SBATCH_HRSA=() # of sbatch: for all stages, and for one
source "$study"

# ---- end of the settings
for name in OUTPUT_DIR TRAIN_DATA PAIRS SEEDS BENCHMARKS; do
  eval "[ -n \"\${$name[*]-}\" ]" || fail "$study: $name is empty"
done
[ $((${#PAIRS[@]} % 3)) = 0 ] || fail "PAIRS: found ${#PAIRS[@]} words, wanted three for each pair: name, base, reasoning"
[ -z "$HRSA_TEXTS" ] || [ -f "$HRSA_TEXTS" ] || fail "HRSA_TEXTS=$HRSA_TEXTS: no such file"
label() { local name=${1%/}; name=${name##*/}; echo "${name//[^A-Za-z0-9._-]/_}"; } # a folder's name
names=() sides=() models=() # models: each once, though several pairs may share one
for ((i = 0; i < ${#PAIRS[@]}; i += 3)); do
  names+=("${PAIRS[i]}") sides+=("${PAIRS[@]:i+1:2}")
  [ "${PAIRS[i + 1]}" != "${PAIRS[i + 2]}" ] || fail "PAIRS: ${PAIRS[i]}: found one model, wanted two"
done
while IFS= read -r model; do models+=("$model"); done < <(printf '%s\n' "${sides[@]}" | awk '!seen[$0]++')
for model in "${models[@]}"; do
  [ ! -f "$root/scripts/training/recipes/${model%.sh}.sh" ] ||
    fail "PAIRS: found the recipe $model, wanted the model that it names; RECIPE is one for all models"
done
# once WHAT PATH...: refuse two that would have one folder.
once() {
  local twice
  twice=$(for name in "${@:2}"; do label "$name"; done | sort | uniq -d | head -n 1)
  [ -z "$twice" ] || fail "$1: found $twice twice, wanted different last names"
}
once "names of PAIRS" "${names[@]}"
once "models of PAIRS" "${models[@]}"
once SEEDS "${SEEDS[@]}"
once BENCHMARKS "${BENCHMARKS[@]}"
count_train=$((${#models[@]} * ${#SEEDS[@]})) count_hrsa=$((${#PAIRS[@]} / 3 * 2)) count_table=1
count_evaluate=$count_train
[ -n "$HRSA_TEXTS" ] || count_hrsa=0

# part FOLDER COMMAND...: run a command that fills a folder, unless it was run to its end. `needs` has the folders of the
# models that it measures.
part() {
  local folder=$1 name=${1#"$OUTPUT_DIR/"} code=0 command need
  shift
  command=$(printf '%q ' "$@")
  if [ -f "$folder/.done" ]; then
    [ "$(cat "$folder/.done")" = "$command" ] || fail "$folder: found it done with other settings, $(cat "$folder/.done")" \
      "wanted $command; set another OUTPUT_DIR, or remove it"
    for need in ${needs[@]+"${needs[@]}"}; do
      [ ! "$need/.done" -nt "$folder/.done" ] || fail "$folder: found it older than $need; remove it to measure again"
    done
    return 0
  fi
  echo "study: $name"
  "$@" &
  child=$!
  while kill -0 $child 2>/dev/null; do wait $child || true; done
  wait $child || code=$?
  child=
  ! grep -qs '"finished": false' "$folder/run.json" || code=75 # stopped, and saved
  [ $code = 0 ] || { echo "study: error: $name ended with exit code $code; the same call goes on" >&2; exit $code; }
  echo "$command" >"$folder/.done.part"
  mv "$folder/.done.part" "$folder/.done"
}
child=
for signal in INT TERM HUP USR1; do trap "kill -${signal/INT/TERM} \$child 2>/dev/null || exit 143" $signal; done

# ---- the parts of each stage, by number. The first seed of all models comes first.
run_of() { echo "$OUTPUT_DIR/runs/$(label "$1")-$2"; } # run_of MODEL SEED

train() {
  local model=${models[$1 % ${#models[@]}]} seed=${SEEDS[$1 / ${#models[@]}]}
  needs=()
  part "$(run_of "$model" "$seed")" train_one "$model" "$seed" "$TRAIN_DATA" "$RECIPE" ${TRAIN_FLAGS[@]+"${TRAIN_FLAGS[@]}"}
}

train_one() {
  export OUTPUT_DIR=$(run_of "$1" "$2") MODEL_NAME_OR_PATH=$1 TRAIN_DATA RECIPE
  ! grep -qs '"finished": true' "$OUTPUT_DIR/run.json" || exit 0
  exec bash "$root/scripts/training/train_embonly.sh" --seed "$2" "${@:5}"
}

evaluate() {
  local run=$(run_of "${models[$1 % ${#models[@]}]}" "${SEEDS[$1 / ${#models[@]}]}") name out
  needs=("$run")
  for name in "${BENCHMARKS[@]}"; do
    out=$OUTPUT_DIR/evaluation/$(basename "$run")/$(label "$name")
    part "$out" "$python" -m gritlm evaluate "$run" --benchmark "$name" --output_folder "$out" \
      ${EVAL_FLAGS[@]+"${EVAL_FLAGS[@]}"}
  done
}

hrsa() { # even numbers: before training; odd ones: after it
  local pair=("${PAIRS[@]:$1 / 2 * 3:3}")
  local out=$OUTPUT_DIR/hrsa/${pair[0]}/before two=("${pair[@]:1}")
  needs=()
  if [ $(($1 % 2)) = 1 ]; then
    two=("$(run_of "${pair[1]}" "${SEEDS[0]}")" "$(run_of "${pair[2]}" "${SEEDS[0]}")")
    out=${out%before}after needs=("${two[@]}")
    [ ${#SEEDS[@]} = 1 ] || two+=(--ceiling "$(run_of "${pair[1]}" "${SEEDS[1]}")")
  fi
  part "$out" "$python" -m gritlm hrsa "${two[@]}" --texts "$HRSA_TEXTS" --output_dir "$out" \
    ${HRSA_FLAGS[@]+"${HRSA_FLAGS[@]}"}
}

table() {
  local words=() name
  for ((i = 0; i < ${#PAIRS[@]}; i += 3)); do
    words+=(--pair "${PAIRS[i]}" "$(label "${PAIRS[i + 1]}")" "$(label "${PAIRS[i + 2]}")")
  done
  for name in "${BENCHMARKS[@]}"; do words+=(--benchmark "$(label "$name")" "$name"); done
  "$python" -m gritlm study-table "$OUTPUT_DIR" "${words[@]}" --seeds "${SEEDS[@]}" \
    --equivalence_margin "$EQUIVALENCE_MARGIN"
}

# submit STAGE FLAGS...: submit this file for a stage, an array task for each part, and print the job's number.
submit() {
  local name=$1 count=count_$1
  sbatch --parsable --job-name "study-$name" --array "0-$((${!count} - 1))" --output "$OUTPUT_DIR/logs/$name-%a.log" \
    --ntasks-per-node 1 --requeue --open-mode append --signal USR1@300 --kill-on-invalid-dep yes \
    ${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"} "${@:2}" --wrap "exec bash $(printf '%q ' "$root/scripts/study.sh" "$study" "$name")"
}

mkdir -p "$OUTPUT_DIR/logs"
finished() { echo "$1 $(find "$OUTPUT_DIR/$2" -maxdepth 3 -name .done 2>/dev/null | wc -l) of $3"; }
echo "study: done: $(finished train runs $count_train), $(finished evaluate evaluation \
  $((count_evaluate * ${#BENCHMARKS[@]}))), $(finished hrsa hrsa $count_hrsa) parts"
if [ "$stage$SUBMIT" = allslurm ]; then
  command -v sbatch >/dev/null || fail "SUBMIT=slurm: found no sbatch on PATH"
  compared=
  trained=$(submit train ${SBATCH_TRAIN[@]+"${SBATCH_TRAIN[@]}"})
  evaluated=$(submit evaluate --dependency "aftercorr:$trained" ${SBATCH_EVALUATE[@]+"${SBATCH_EVALUATE[@]}"})
  [ $count_hrsa = 0 ] ||
    compared=$(submit hrsa --dependency "afterok:$trained" ${SBATCH_HRSA[@]+"${SBATCH_HRSA[@]}"})
  last=$(submit table --dependency "afterany:$evaluated${compared:+:$compared}")
  echo "study: jobs $trained (train), $evaluated (evaluate), ${compared:+$compared (hrsa), }$last (table); logs in $OUTPUT_DIR/logs"
  exit
fi
for name in train evaluate hrsa table; do
  [ "$stage" = all ] || [ "$stage" = $name ] || continue
  count=count_$name
  [ -z "$number" ] || [ "$number" -lt "${!count}" ] || fail "$name: found the part $number, wanted one below ${!count}"
  for ((part = ${number:-0}; part < ${number:-${!count} - 1} + 1; part++)); do $name $part; done
done
