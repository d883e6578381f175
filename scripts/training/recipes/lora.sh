# The paper's recipe with LoRA on all linear layers, as the original trains it. The rate is ten times that of full tuning.
LEARNING_RATE=${LEARNING_RATE:-2e-4}
source "$root/scripts/training/recipes/paper.sh"
RECIPE_FLAGS+=(--lora True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1)
