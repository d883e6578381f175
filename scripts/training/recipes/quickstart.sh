# The embedded default: a tiny untrained Qwen3, and pairs of docstring and code from this machine's Python.
# Trains on two CPU cores in less than five minutes.
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256}
TRAIN_GROUP_SIZE=${TRAIN_GROUP_SIZE:-1}
QUERY_MAX_LEN=${QUERY_MAX_LEN:-64}
PASSAGE_MAX_LEN=${PASSAGE_MAX_LEN:-64}
LEARNING_RATE=${LEARNING_RATE:-4e-3}
TEMPERATURE=${TEMPERATURE:-0.05}
MAX_STEPS=${MAX_STEPS:-180}
