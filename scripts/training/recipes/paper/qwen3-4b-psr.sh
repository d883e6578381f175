# The reasoning model of the PSR pair (arXiv 2506.01347): a folder. Download it first.
MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-models/Qwen3-4B-PSR}
source "$root/scripts/training/recipes/paper.sh"
