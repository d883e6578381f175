# The reasoning model of the SimpleRL-Zoo pair of 1.5B.
MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-hkust-nlp/Qwen-2.5-1.5B-SimpleRL-Zoo}
source "$root/scripts/training/recipes/paper.sh"
