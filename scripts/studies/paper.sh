# The study of the paper (arXiv 2601.21192): its five pairs, its recipe, three seeds, three benchmarks.
#   TRAIN_DATA=data/ HRSA_TEXTS=traces.jsonl bash scripts/study.sh scripts/studies/paper.sh
OUTPUT_DIR=${OUTPUT_DIR:-outputs/paper-study}
RECIPE=paper
PAIRS=(
  sft-0.6b Qwen/Qwen3-0.6B-Base Qwen/Qwen3-0.6B
  zoo-0.5b Qwen/Qwen2.5-0.5B hkust-nlp/Qwen-2.5-0.5B-SimpleRL-Zoo
  zoo-1.5b Qwen/Qwen2.5-1.5B hkust-nlp/Qwen-2.5-1.5B-SimpleRL-Zoo
  prorl-1.5b deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B nvidia/Nemotron-Research-Reasoning-Qwen-1.5B
  psr-4b Qwen/Qwen3-4B models/Qwen3-4B-PSR # a folder: download it first
)
BENCHMARKS=("MTEB(Multilingual, v2)" "MTEB(Code, v1)" BRIGHT)
SBATCH_TRAIN=(--nodes 1 --gpus-per-node 8 --exclusive --mem 0)
SBATCH_EVALUATE=(--gpus-per-node 1) SBATCH_HRSA=(--gpus-per-node 1)
