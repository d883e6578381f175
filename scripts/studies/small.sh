# A study of minutes on two CPU cores, without any download: a tiny base, and two models that go on from it. The pair sft
# stands for a model that training moved far, rlvr for one that stayed close (small_models.py).
OUTPUT_DIR=${OUTPUT_DIR:-outputs/small-study}
task=$OUTPUT_DIR/task
"$python" -m gritlm quickstart prepare --folder "$task" --max_pairs 0
"$python" "$root/scripts/studies/small_models.py" "$task" "${SMALL_STEPS:-200}"
mkdir -p "$task/eval/to_code" "$task/eval/to_summary/qrels"  # the held-out pairs in both directions
cp -R "$task/held_out/." "$task/eval/to_code"
cp "$task/held_out/queries.jsonl" "$task/eval/to_summary/corpus.jsonl"
cp "$task/held_out/corpus.jsonl" "$task/eval/to_summary/queries.jsonl"
cp "$task/held_out/qrels/test.tsv" "$task/eval/to_summary/qrels"
PAIRS=(sft "$task/base-lm" "$task/sft" rlvr "$task/base-lm" "$task/rlvr")
TRAIN_DATA=$task/train.jsonl
BENCHMARKS=("$task/eval")
HRSA_TEXTS=$task/held_out/corpus.jsonl
HRSA_FLAGS=(--text_column text --more "retrained=$task/retrained") # the same text, another random start
TRAIN_FLAGS=(
  --global_batch_size 64 --train_group_size 1 --query_max_len 32 --passage_max_len 32 --max_steps 120
  --learning_rate 4e-3 --temperature 0.05 --save_strategy no
)
