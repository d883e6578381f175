# Long texts: 2,048 tokens, and one hard negative a query in place of three, as in the original.
TRAIN_GROUP_SIZE=${TRAIN_GROUP_SIZE:-2}
QUERY_MAX_LEN=${QUERY_MAX_LEN:-2048}
PASSAGE_MAX_LEN=${PASSAGE_MAX_LEN:-2048}
source "$root/scripts/training/recipes/paper.sh"
