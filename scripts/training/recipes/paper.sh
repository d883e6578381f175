# The recipe of the paper (arXiv 2601.21192, appendix A). One epoch of its 1,603,172 rows has 782 steps. The files in
# paper/ name its models. TRAIN_DATA is a folder of its eleven data sets, each with three hard negatives a query.
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-2048}
TRAIN_GROUP_SIZE=${TRAIN_GROUP_SIZE:-4}
QUERY_MAX_LEN=${QUERY_MAX_LEN:-512}
PASSAGE_MAX_LEN=${PASSAGE_MAX_LEN:-512}
LEARNING_RATE=${LEARNING_RATE:-2e-5}
TEMPERATURE=${TEMPERATURE:-0.02}
NUM_TRAIN_EPOCHS=${NUM_TRAIN_EPOCHS:-1}
RECIPE_FLAGS=(
  --contract paper --attn bb --normalized True --optim adamw_torch_fused --lr_scheduler_type cosine
  --warmup_steps 0.03 --weight_decay 0.05
)
