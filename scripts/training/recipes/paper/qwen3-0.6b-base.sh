# The base of the SFT pair.
MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-Qwen/Qwen3-0.6B-Base}
source "$root/scripts/training/recipes/paper.sh"
