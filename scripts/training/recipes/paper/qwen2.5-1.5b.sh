# The base of the SimpleRL-Zoo pair of 1.5B.
MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-Qwen/Qwen2.5-1.5B}
source "$root/scripts/training/recipes/paper.sh"
