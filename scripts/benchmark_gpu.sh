#!/usr/bin/env bash
# Measure the figures of benchmarks.md on one GPU, without a network, in about 10 minutes:
#   bash scripts/benchmark_gpu.sh [OUT]
# First the gradients on each engine, then the time and memory of a step, then the Trainer on each engine. Each part has
# a time limit, and the others run if one fails. PARTS="ways peer" runs only these parts.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-outputs/benchmark_gpu}
mkdir -p "$out"
python=${PYTHON:-.venv/bin/python}
gritlm="$python -m gritlm"
failed=0
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # as in the launch script

part() { # part NAME SECONDS command ...
  local name=$1 limit=$2 code=0
  shift 2
  [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
  echo "== $name: $*" | tee -a "$out/log.txt"
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?
  grep -v -i warning "$out/$name.txt" | tail -n 30 | cut -c1-400 | tee -a "$out/log.txt"
  [ $code = 0 ] || { echo "!! $name ended with code $code; its whole output: $out/$name.txt"; failed=1; }
}
step() { # step NAME SECONDS flags ...
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" $gritlm benchmark --bf16 --rounds 2 --json "$out/$name.json" "$@"
}

$python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' | tee "$out/log.txt" || exit 2
$python - "$out" <<'PYTHON' || exit 2
import json, sys
from pathlib import Path
from gritlm.benchmark.workload import build_model
from gritlm.data.stdlib_pairs import collect
out = Path(sys.argv[1])
pairs, _ = collect(0)
with open(out / "pairs.jsonl", "w") as file:
    for summary, code in pairs:
        file.write(json.dumps({"query": summary, "pos": [code], "neg": []}) + "\n")
build_model(out / "qwen3-0.6b", "qwen3-0.6b", [text for pair in pairs for text in pair])
PYTHON

part gradients 60 $gritlm verify-gradients --model_name_or_path "$out/qwen3-0.6b" --ranks 1 --engines plain ddp fsdp2
# By `gritlm benchmark memory` a chunk needs 39 GB here, 14 GB in `checkpointed` and 30 GB in `larger_model`: each fits
# into 80 GB.
small="--model qwen3-0.6b --chunk_tokens 16384"
step ways 90 $small --queries 512 --activation_memory 0 auto --attn_implementation packed sdpa
step compiled 90 $small --queries 512 --activation_memory 0 auto --torch_compile no yes
step large 90 $small --queries 2048 --activation_memory auto
step checkpointed 60 --model qwen3-0.6b --queries 512 --chunk_tokens 65536 --activation_memory 0 auto \
  --gradient_checkpointing
step uniform 60 $small --queries 128 --lengths uniform:512 --activation_memory 0 auto
step peer 120 $small --queries 256 --activation_memory auto --compare sentence-transformers
step larger_model 90 --model qwen2.5-1.5b --queries 512 --chunk_tokens 8192 --activation_memory 0 auto
part loss 30 $gritlm benchmark loss --queries 16384 --passages 65536 --width 1024

train=($python -m torch.distributed.run --standalone --nproc-per-node 1 -m gritlm train
  --model_name_or_path "$out/qwen3-0.6b" --train_data "$out/pairs.jsonl" --global_batch_size 512 --bf16 True
  --max_steps 6 --save_strategy no --logging_steps 2 --chunk_tokens 16384)
part trainer_ddp 60 "${train[@]}" --output_dir "$out/ddp"
part trainer_compiled 90 "${train[@]}" --output_dir "$out/compiled" --torch_compile True
part trainer_fsdp2 60 "${train[@]}" --output_dir "$out/fsdp2" --fsdp full_shard --fsdp_config scripts/parallel/fsdp2.json
rm -rf "$out"/{qwen3-0.6b,ddp,compiled,fsdp2}
echo "log: $out/log.txt" && exit $failed
