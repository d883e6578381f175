#!/usr/bin/env bash
# Set up, then lint and test. Extra arguments go to pytest: bash scripts/test.sh tests/unit -k plan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
.venv/bin/ruff check . && .venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
