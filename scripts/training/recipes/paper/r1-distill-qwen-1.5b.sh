# The base of the ProRL pair.
MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B}
source "$root/scripts/training/recipes/paper.sh"
