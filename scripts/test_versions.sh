#!/usr/bin/env bash
# Run the tests on the oldest and on the newest supported versions of torch, transformers and sentence-transformers.
# usage: test_versions.sh [oldest|newest] [arguments of pytest]      without the first: both, one after the other
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  oldest | newest) which=$1; shift ;;
  *) for which in oldest newest; do bash scripts/test_versions.sh $which "$@"; done; exit ;;
esac

# Oldest: the lower bounds of pyproject.toml. Newest: what the index has. All else as in requirements.txt.
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
grep -vE '^(torch|transformers|sentence-transformers)==' requirements.txt >"$requirements"
for name in torch transformers sentence-transformers; do
  bound=$(grep -oE "\"$name>=[0-9.]+\"" pyproject.toml | tr -d '"')
  if [ $which = oldest ]; then echo "${bound/>=/==}"; else echo "$bound"; fi
done >>"$requirements"
if [ $which = oldest ]; then sed -i 's/^accelerate==/accelerate>=/' "$requirements"; fi

venv=.venv-$which
[ -x $venv/bin/pip ] || "${PYTHON:-python3}" -m venv $venv
$venv/bin/pip install --quiet --disable-pip-version-check --upgrade -r "$requirements"
$venv/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
echo "versions ($which): $($venv/bin/pip list 2>/dev/null | grep -E '^(torch|transformers|sentence-transformers|accelerate) ' | tr -s ' ' | paste -sd ',')"
OMP_NUM_THREADS=1 $venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
