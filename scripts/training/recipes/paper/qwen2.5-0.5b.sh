# The base of the SimpleRL-Zoo pair of 0.5B.
MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-Qwen/Qwen2.5-0.5B}
source "$root/scripts/training/recipes/paper.sh"
