# A causal model whose last token is the vector, in the form of Qwen3-Embedding: every text ends with the end token.
MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-Qwen/Qwen3-0.6B}
RECIPE_FLAGS=(--attn cc --pooling_method lasttoken --pool_instruction True --append_eos True)
