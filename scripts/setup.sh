#!/usr/bin/env bash
# Create .venv with all dependencies. The other scripts call this first; it is quick when nothing has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "setup: error: $*" >&2; exit 2; }

stamp="$(cat requirements.txt pyproject.toml | cksum) $(pwd -P)"  # the checkout itself, whatever links lead to it
[ "$(cat .venv/.installed 2>/dev/null)" = "$stamp" ] && exit 0

python=
for candidate in python3 python3.13 python3.12 python3.11 python; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
done
[ -n "$python" ] || fail "found no Python 3.11 or newer on PATH; install one and run this again"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
run() {
  "$@" >"$log" 2>&1 && return
  local why
  if grep -qiE 'no space left|errno 28' "$log"; then why="the disk is full (CUDA included, about 8 GB are needed)"
  elif grep -qiE 'ensurepip is not available' "$log"; then why="this Python has no venv module (on Debian: apt install python3-venv)"
  elif grep -qiE 'connection|name resolution|timed out|no matching distribution|failed to fetch' "$log"; then
    why="the package index cannot be reached (is there a network?): $(grep -iE 'error' "$log" | tail -n 1)"
  else why=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1); fi
  fail "'$1 ... ${*: -1}' failed: $why"
}

started=$SECONDS
if command -v uv >/dev/null; then
  echo "setup: creating .venv with uv ($($python --version)); this happens once"
  [ -x .venv/bin/python ] || run uv venv --seed --python "$python" .venv
  run uv pip install --python .venv/bin/python -r requirements.txt
  run uv pip install --python .venv/bin/python --no-deps -e .
else
  echo "setup: creating .venv with venv and pip ($($python --version)); this happens once and takes minutes"
  [ -x .venv/bin/pip ] || run "$python" -m venv .venv
  run .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
  run .venv/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
fi
echo "$stamp" > .venv/.installed
echo "setup: done in $((SECONDS - started)) s"
