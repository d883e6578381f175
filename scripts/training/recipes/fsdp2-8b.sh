# A model of 8B parameters on eight GPUs of 80 GB: FSDP2 shards weights, gradients and optimizer state.
MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-Qwen/Qwen3-8B}
RECIPE_FLAGS=(--fsdp full_shard --fsdp_config "$root/scripts/parallel/fsdp2.json")
