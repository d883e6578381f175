# The reasoning model of the SFT pair.
MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-Qwen/Qwen3-0.6B}
source "$root/scripts/training/recipes/paper.sh"
