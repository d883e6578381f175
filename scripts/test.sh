#!/usr/bin/env bash
# Set up, check style and types, then test. Extra arguments go to pytest: bash scripts/test.sh tests/unit -k plan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# mypy sees the package as it is installed, with models/ inside.
rm -rf .venv/types && mkdir -p .venv/types/gritlm && ln -s "$PWD"/gritlm/* "$PWD"/models .venv/types/gritlm/
(cd .venv/types && ../bin/mypy --config-file "$OLDPWD/pyproject.toml" --package gritlm)
# Two or more workers of one thread each: most tests wait for processes, few for arithmetic.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
