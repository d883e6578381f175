# The base of the PSR pair.
MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-Qwen/Qwen3-4B}
source "$root/scripts/training/recipes/paper.sh"
