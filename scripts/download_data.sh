#!/usr/bin/env bash
# Convert a data set of the Hugging Face Hub to the training format (needs a network):
#   bash scripts/download_data.sh sentence-transformers/natural-questions data/nq --held_out 500
# More flags and other sources: gritlm prepare --help
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: download_data.sh NAME_ON_THE_HUB OUT [flags of gritlm prepare]" >&2
  exit 2
fi
name=$1 out=$2
shift 2
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
cd "$here"
exec "$OLDPWD/.venv/bin/python" -m gritlm prepare "hub:$name" "$out" "$@"
