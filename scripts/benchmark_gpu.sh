#!/usr/bin/env bash
# Measure the figures of benchmarks.md on one GPU, without a network. Meant to take about 7 minutes there:
#   bash scripts/benchmark_gpu.sh [OUT]
# OUT/results.jsonl gets a line for each figure as it is found, OUT/log.txt all output, OUT/profile.txt the slowest
# kernels. Each part has a time limit, and the others run if one fails. PARTS="checks measure" runs only these parts.
# Without a GPU, MODEL=tiny OMP_NUM_THREADS=1 tries the script.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-outputs/benchmark_gpu}
python=${PYTHON:-.venv/bin/python}
model=${MODEL:-qwen3-0.6b}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d) # the models: they are large
trap 'rm -rf "$work"' EXIT
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # as in the launch script
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

part() { # part NAME SECONDS command ...
  local name=$1 limit=$2 code=0
  shift 2
  [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
  echo "== $name, at $SECONDS s" | tee -a "$out/log.txt"
  timeout -k 5 "$limit" "$@" >"$work/$name.txt" 2>&1 || code=$?
  [ $code = 0 ] || tail -n 5 "$work"/check-*.txt >>"$work/$name.txt" 2>/dev/null
  cat "$work/$name.txt" >>"$out/log.txt"
  grep -v -i warning "$work/$name.txt" | tail -n 40 | cut -c1-300
  [ $code = 0 ] || { echo "!! $name ended with code $code" | tee -a "$out/log.txt"; failed=1; }
}

"$python" - "$work" "$model" <<'PYTHON' || exit 2
import json, sys
from pathlib import Path
import torch, transformers
from gritlm.benchmark.workload import build_model
from gritlm.data.stdlib_pairs import collect
work, model = Path(sys.argv[1]), sys.argv[2]
cuda = torch.cuda.is_available()
if not cuda and model != "tiny":
    sys.exit("found no GPU; MODEL=tiny tries the script without one")
print(f"torch {torch.__version__}, transformers {transformers.__version__}", torch.cuda.get_device_name() if cuda else "")
pairs, _ = collect(0)
rows = [json.dumps({"query": summary, "pos": [code], "neg": []}) + "\n" for summary, code in pairs]
(work / "pairs.jsonl").write_text("".join(rows))
with torch.device("cuda" if cuda else "cpu"):  # 0.6 billion random numbers take seconds on a CPU
    for name in {model, "tiny"}:
        build_model(work / name, name, [text for pair in pairs for text in pair])
PYTHON

# ---- is it right? All at once, on tiny models. A run that was stopped and resumed must end with the same weights; the
# attention kernel's backward pass adds in any order, unless --full_determinism is given.

checks() {
  export OMP_NUM_THREADS=1 # many small processes
  local gritlm="$python -m gritlm" size="--global_batch_size 128 --bf16 True --max_steps 60" pids=() kind
  [ "${MODEL:-}" != tiny ] || size="--global_batch_size 4 --passage_max_len 8 --query_max_len 8 --max_steps 8"
  check() { # check NAME command ...
    "${@:2}" >"$work/check-$1.txt" 2>&1 & pids+=($!)
  }
  halves() { # stop it after its first step, then resume it
    "$@" & local run=$!
    until [ -e "${!#}/checkpoint-1" ] || ! kill -0 $run 2>/dev/null; do sleep 0.1; done
    kill -USR1 $run; wait $run
    "$@"
  }
  local verify="$gritlm verify-gradients --ranks 1 --engines"
  check gradients $verify plain ddp fsdp2
  check bf16 $verify plain ddp fsdp2 --bf16 --chunks 16
  check compiled $verify plain fsdp2 --terms info_nce --torch_compile True
  for kind in False True; do
    local train="$gritlm train --model_name_or_path $work/tiny --train_data $work/pairs.jsonl --full_determinism $kind
      $size --save_steps 1000 --logging_steps 20 --output_dir"
    check "whole-$kind" $train "$work/whole-$kind"
    check "halves-$kind" halves $train "$work/halves-$kind"
  done
  wait "${pids[@]}"
  grep -H "WRONG\|rror\|probe\|resum\|equal one\|at most" "$work"/check-*.txt | sed "s|^$work/check-||" | cut -c1-250
  "$python" - "$work" <<'PYTHON'
import sys
from pathlib import Path
from safetensors.torch import load_file
for kind in ("False", "True"):
    whole, halves = (load_file(Path(sys.argv[1], f"{name}-{kind}", "model.safetensors")) for name in ("whole", "halves"))
    far = max(float((whole[key] - halves[key]).norm() / whole[key].norm()) for key in whole)
    print(f"resumed, --full_determinism {kind}: weights differ by {far:.1e} at most in relative norm")
PYTHON
}
export -f checks
export work python MODEL=$model
part checks "${CHECKS_SECONDS:-110}" bash -c checks

# ---- how fast, and with how much memory? One process: it imports torch and builds the rows once.

cat >"$work/measure.py" <<'PYTHON'
import gc, json, re, sys, time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModel

from gritlm.benchmark import loss as benchmark_loss
from gritlm.benchmark.contestants import GritLMStep, choose_fastest, set_checkpointing
from gritlm.benchmark.encode import encode_in_turn
from gritlm.benchmark.memory import chunk_footprint
from gritlm.benchmark.sentence_transformers import build_step, load_encode
from gritlm.benchmark.workload import *
from gritlm.gritlm import GritLM
from gritlm.models.attention import Packing, packed_attention
from gritlm.models.compiled import compile_layers

out, work, name, limit = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
began = time.perf_counter()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
cuda = device.type == "cuda"
PEAK = 989e12  # FLOP/s in dense bfloat16, of an H100 or H200
batch, full, cut = (256, 16384, 512) if cuda else (4, 512, 64)
pairs = [(row["query"], *row["pos"]) for row in map(json.loads, open(work / "pairs.jsonl"))]
half = torch.bfloat16 if cuda else torch.float32
flat, rates = {}, {}


def measured(what, function, *args, **options):
    """Call it, and write what it returns. An error does not stop the others."""
    if time.perf_counter() - began > limit:
        return print("no time for", what)
    started = time.perf_counter()
    try:
        figures = function(*args, **options)
    except Exception as error:
        figures = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    line = json.dumps({"what": what, **figures, "took": round(time.perf_counter() - started, 1)})
    print(line, flush=True)
    with open(out / "results.jsonl", "a") as file:
        file.write(line + "\n")
    gc.collect()
    torch.compiler.reset()
    if cuda:
        torch.cuda.empty_cache()


def seconds(function, times=10):
    function(), function()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        function()
    synchronize(device)
    return (time.perf_counter() - started) / times


def workload(queries, uniform=0):
    folder, length = work / f"rows-{queries}-{uniform}", uniform or cut
    if not folder.exists():
        folder.mkdir()
        (folder / "model").symlink_to(work / name)
        write_rows(folder / "pairs.jsonl", pairs, 2 * queries, 4, bool(uniform))
    (records,) = load_records(folder / "pairs.jsonl", folder / "cache")
    contract = TextContract(query_max_len=length, passage_max_len=length)
    tokenizer = TextTokenizer(load_tokenizer(str(folder / "model"), contract), contract)
    return Workload(folder, records, tokenizer, Plan([records.name], [len(records)], queries, seed=0), 4, device, cuda)


def lengths_of(load):
    chunks = load.builder(ChunkConfig(full, deduplicate=False))[0, 0].chunks
    return torch.cat([chunk["lengths"] for chunk in chunks]).numpy()


# ---- what the machine gives


def products():
    """FLOP/s of a large product, and of the products of a layer, forward and backward. The speed of a copy."""
    config = model_config(name)
    rates["product"] = matrix_rate(device, cuda)
    found = {"large, TFLOP/s": rates["product"] / 1e12}
    width, inner = config.hidden_size, config.intermediate_size
    heads, groups = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = (width, heads, 1), (width, groups, 2), (heads, width, 1), (width, inner, 2), (inner, width, 1)
    for tokens in (full, 4 * full):
        spent = flops = 0.0
        for a, b, times in layer:
            x, w, y = (torch.randn(*shape, device=device, dtype=half) for shape in ((tokens, a), (b, a), (tokens, b)))
            spent += times * sum(map(seconds, (lambda: x @ w.T, lambda: y @ w, lambda: y.T @ x)))
            flops += times * 6 * tokens * a * b
        found[f"a layer's, {tokens} tokens, TFLOP/s"] = flops / spent / 1e12
    x = torch.empty(2**31 if cuda else 2**20, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return found | {"copy, TB/s": 2 * x.nbytes / seconds(lambda: y.copy_(x)) / 1e12}


def attention(lengths, kernel="packed"):
    """FLOP/s of the attention of packed texts, forward and backward. Other kernels: what they could give."""
    config, lengths = model_config(name), np.sort(lengths)[::-1]
    q, k, v = (
        torch.randn(1, n, int(lengths.sum()), config.head_dim, device=device, dtype=half, requires_grad=True)
        for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
    )
    runs = tuple((int((lengths == n).sum()), int(n)) for n in sorted(set(lengths), reverse=True))
    packing = Packing(runs, F.pad(torch.tensor(lengths.copy(), device=device).cumsum(0), (1, 0)).int())
    module = SimpleNamespace(config=SimpleNamespace(is_causal=False))
    parts = [x.detach().unflatten(2, runs[0])[0].transpose(0, 1).requires_grad_() for x in (q, k, v) if len(runs) == 1]

    def run():
        if kernel == "packed":
            given, result = (q, k, v), packed_attention(module, q, k, v, None, packing=packing)[0]
        else:
            with sdpa_kernel(getattr(SDPBackend, kernel)):
                given, result = parts, F.scaled_dot_product_attention(*parts, enable_gqa=True)
        torch.autograd.grad(result, given, torch.ones_like(result))

    flops = 12 * config.num_attention_heads * config.head_dim * (lengths.astype(float) ** 2).sum()
    return {"TFLOP/s": float(flops / seconds(run) / 1e12)}


# ---- a step, a chunk


def step(load, build, rounds=3, profiled=False):
    built = build(load)
    before = memory_in_use(device)
    best = choose_fastest(built)[1] if len(built.settings) > 1 else {}
    built.step(), built.step()
    found, peaks, parts = [], [], []
    for _ in range(rounds):
        (value, part), taken, peak = measure(built.step, device)
        found.append(taken), peaks.append(peak - before), parts.append(part)
    lengths, taken = lengths_of(load), float(np.median(found))
    flops = useful_flops(load.config(), lengths)
    figures = {"s": taken, "all s": found, "tokens/s": lengths.sum() / taken, "tokens": int(lengths.sum())}
    figures |= {"MFU": flops / taken / PEAK, "MFU of product": flops / taken / rates.get("product", PEAK)}
    figures |= {"peak GB": max(peaks) / 1e9, "loss": value.item(), "parts": {k: round(v, 4) for k, v in parts[-1].items()}}
    gradient = torch.cat([p.grad.flatten() for p in built.model.parameters() if p.grad is not None]).cpu()
    wanted = flat.setdefault(load.folder, gradient)
    figures["gradient differs by"] = ((gradient - wanted).norm() / wanted.norm()).item()
    if profiled:
        figures |= profile(built.step)
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()} | {"settings": best}


KINDS = {
    "attention": "flash|fmha|attention", "products": "gemm|nvjet|cutlass|xmma|cublas|splitk|aten::mm|aten::addmm",
    "compiled": "^triton", "copies": "memcpy|memset|copy", "sums": "segment|reduce|softmax|norm", "elements": "elementwise",
}


def profile(function):
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CUDA if cuda else kind.CPU]) as recorded:
        _, taken, _ = measure(function, device)
    recorded.export_chrome_trace(str(work / "trace.json"))
    wanted = ("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)
    events = [e for e in json.loads((work / "trace.json").read_text())["traceEvents"] if e.get("cat") in wanted]
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events)
    busy, end = 0.0, 0.0
    for a, b in spans:
        busy, end = busy + max(0.0, b - max(a, end)), max(b, end)
    total, names = Counter(), Counter()
    for e in events:
        kind = next((k for k, v in KINDS.items() if re.search(v, e["name"], re.I)), "others")
        total[kind] += e["dur"] / 1e6
        names[e["name"][:150]] += e["dur"] / 1e6
    with open(out / "profile.txt", "a") as file:
        file.writelines(f"{taken:9.5f}  {n}\n" for n, taken in names.most_common(40))
        file.write("\n")
    shares = {k: round(v, 4) for k, v in total.most_common()}
    return {"profiled s": taken, "idle s": taken - busy / 1e6, "kernels": len(events), "by kind, s": shares}


def chunk(model_name, tokens, checkpointing="none", compiled=False):
    """One chunk of equally long texts, forward and backward, beside what `gritlm benchmark memory` counts."""
    config = model_config(model_name)
    with torch.device(device):
        model = Embedder(AutoModel.from_config(config, dtype=torch.float32, attn_implementation=PACKED), TextContract())
    model.train()
    set_checkpointing(model, checkpointing)
    if compiled and (problem := compile_layers(model, device, cuda)):
        return {"error": problem}
    texts, kept = tokens // cut, []
    ids, lengths = torch.randint(0, 8192, (texts * cut,), device=device), torch.full((texts,), cut, device=device)
    def once():
        started = memory_in_use(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
            vectors = model(ids, lengths, torch.zeros_like(lengths), equal_length_runs=((texts, cut),))
        kept.append(memory_in_use(device) - started)
        vectors.backward(torch.randn_like(vectors))
    once(), once()
    before = memory_in_use(device)
    runs = [measure(once, device)[1:] for _ in range(3)]
    reserved = torch.cuda.max_memory_reserved() - before if cuda else 0
    taken, peak = min(run[0] for run in runs), max(run[1] for run in runs) - before
    with torch.device("cpu"):
        counted = chunk_footprint(config, texts * cut, cut, cuda, checkpointing)
    figures = {"s": taken, "MFU": useful_flops(config, np.full(texts, cut)) / taken / PEAK, "peak GB": peak / 1e9}
    figures |= {"counted GB": counted.peak / 1e9, "reserved GB": reserved / 1e9, "kept GB": kept[-1] / 1e9}
    return {k: float(f"{v:.4g}") for k, v in (figures | {"counted kept GB": counted.kept / 1e9}).items()}


def loss():
    benchmark_loss.DENSE_LIMIT = 5e9
    queries, passages, width = (16384, 65536, 1024) if cuda else (64, 256, 32)
    return benchmark_loss.measure_loss(SimpleNamespace(queries=queries, passages=passages, width=width, rounds=3))


def encode(folder, dtype, count, tokens, sizes):
    texts = [code for _, code in pairs[:count]]
    ours, theirs = GritLM(folder, dtype=dtype), load_encode(folder, dtype, device)
    contestants = {f"gritlm {n}": partial(ours.encode, texts, chunk_tokens=n, convert_to_tensor=True) for n in tokens}
    contestants |= {f"sentence-transformers {n}": partial(theirs, texts, batch_size=n) for n in sizes}
    vectors, taken = encode_in_turn(contestants, 2)
    first = next(iter(vectors.values()))
    cosine = {n: (F.normalize(v, dim=1) * F.normalize(first, dim=1)).sum(1).min().item() for n, v in vectors.items()}
    return {"texts/s": {n: round(len(texts) / min(t), 1) for n, t in taken.items()}, "cosine at least": cosine}


def ours(attention, memory, compiled=False, tokens=full, checkpointing="none"):
    return GritLMStep(attention, memory, tokens, checkpointing, compiled).build


small = batch // 8 or 2  # so few that all graphs fit
measured("products", products)
measured("attention, rows", attention, lengths_of(workload(batch))[:: batch // 4])
for kernel in ("packed", "FLASH_ATTENTION", "CUDNN_ATTENTION"):
    measured(f"attention, uniform, {kernel}", attention, np.full(full // cut, cut), kernel)
measured("chunk", chunk, name, full)
measured("chunk, compiled", chunk, name, full, compiled=True)
for what, load in ((f"{small} queries", workload(small)), (f"{small // 2} queries of {cut}", workload(small // 2, cut))):
    measured(f"{what}: all kept, compiled", step, load, ours(PACKED, "auto", True), profiled=True)
    measured(f"{what}: all kept", step, load, ours(PACKED, "auto"), profiled=True)
many = workload(batch)
measured(f"{batch} queries: auto, compiled", step, many, ours(PACKED, "auto", True))
measured(f"{batch} queries: recomputed, compiled", step, many, ours(PACKED, "0", True))
measured(f"{batch} queries: auto, compiled, chunks of {2 * full}", step, many, ours(PACKED, "auto", True, 2 * full))
measured(f"{batch} queries: auto", step, many, ours(PACKED, "auto"))
measured(f"{batch} queries: auto, selective", step, many, ours(PACKED, "auto", checkpointing="selective"))
measured(f"{batch} queries: recomputed", step, many, ours(PACKED, "0"))
measured(f"{batch} queries: auto, sdpa", step, many, ours("sdpa", "auto"), rounds=2)
many.save_served()
measured(f"{batch} queries: sentence-transformers", step, many, build_step, rounds=2)
measured("loss", loss)
measured("selectively checkpointed chunk", chunk, name, 2 * full, checkpointing="selective")
measured("checkpointed chunk", chunk, name, 4 * full, checkpointing="full")
if cuda:
    measured("qwen2.5-1.5b: chunk", chunk, "qwen2.5-1.5b", full)
    measured("qwen3-4b: checkpointed chunk", chunk, "qwen3-4b", full, checkpointing="full")
    measured("qwen3-4b: a quarter of a chunk, compiled", chunk, "qwen3-4b", full // 4, compiled=True)
measured("encode", encode, many.served, half, 16 * batch, (full, 4 * full), (32, 128, 512) if cuda else (8,))
if (work / "whole-True").exists():
    measured("trained and served", encode, work / "whole-True", torch.float32, 16, (full,), (8,))
PYTHON
part measure "${MEASURE_SECONDS:-300}" "$python" -u "$work/measure.py" "$out" "$work" "$model" "$((${MEASURE_SECONDS:-300} - 20))"

# ---- the Trainer with its optimizer, on each engine

train=("$python" -m torch.distributed.run --standalone --nproc-per-node 1 -m gritlm train
  --model_name_or_path "$work/$model" --train_data "$work/pairs.jsonl" --global_batch_size "${BATCH:-512}"
  --max_steps 8 --save_strategy no --logging_steps 2 --chunk_tokens 16384)
[ "$model" = tiny ] || train+=(--bf16 True)
part trainer_ddp 70 "${train[@]}" --output_dir "$work/ddp"
part trainer_compiled 90 "${train[@]}" --output_dir "$work/compiled" --torch_compile True
[ "$model" = tiny ] || part trainer_fsdp2 70 "${train[@]}" --output_dir "$work/fsdp2" --fsdp full_shard \
  --fsdp_config scripts/parallel/fsdp2.json
for run in ddp compiled fsdp2; do # the last steps of each
  [ ! -e "$work/$run/log.jsonl" ] || { echo "{\"what\": \"trainer $run\"}"; tail -n 2 "$work/$run/log.jsonl" | head -n 1; }
done | tee -a "$out/results.jsonl"
echo "results: $out/results.jsonl, $SECONDS s" && exit $failed
