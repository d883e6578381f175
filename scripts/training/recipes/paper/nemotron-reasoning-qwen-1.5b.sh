# The reasoning model of the ProRL pair.
MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-nvidia/Nemotron-Research-Reasoning-Qwen-1.5B}
source "$root/scripts/training/recipes/paper.sh"
