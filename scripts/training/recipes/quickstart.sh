# The embedded default: a tiny Qwen3 from scratch on docstring -> code pairs of this machine's own Python.
# Small enough for two CPU cores in under five minutes.
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256}
TRAIN_GROUP_SIZE=${TRAIN_GROUP_SIZE:-1}
QUERY_MAX_LEN=${QUERY_MAX_LEN:-64}
PASSAGE_MAX_LEN=${PASSAGE_MAX_LEN:-64}
LEARNING_RATE=${LEARNING_RATE:-4e-3}
TEMPERATURE=${TEMPERATURE:-0.05}
MAX_STEPS=${MAX_STEPS:-180}
