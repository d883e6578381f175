#!/usr/bin/env bash
# Run torchrun on one node. train_embonly.sh calls it: node.sh HEAD PORT NODES PROCESSES [flags of gritlm train]
# On SIGUSR1 or SIGTERM the workers save and exit with code 0, and run.json says "finished": false. On SIGHUP they exit
# at once.
set -uo pipefail
head=$1 port=$2 nodes=$3 processes=$4
shift 4
RENDEZVOUS_SECONDS=${RENDEZVOUS_SECONDS:-300}
export THP_MEM_ALLOC_ENABLE=${THP_MEM_ALLOC_ENABLE:-1} # large memory pages in torch: about 8% faster on a CPU
# Chunks have many shapes. Expandable segments keep them from fragmenting the GPU memory.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
[ -t 2 ] || export TQDM_MININTERVAL=${TQDM_MININTERVAL:-10}     # seconds between lines of a progress bar in a log

cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo "$processes")
[ "$cores" -ge "$processes" ] || echo "node: $(hostname): found $cores CPU cores for $processes processes, which also" \
  "tokenise: slow. Under SLURM ask for more, with --exclusive or --cpus-per-gpu 8" >&2

if [ "$nodes" = 1 ]; then
  where=(--standalone)
else
  started=$SECONDS
  while [ "${SLURM_NODEID:-0}" != 0 ] && ! (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; do
    if [ $((SECONDS - started)) -ge "$RENDEZVOUS_SECONDS" ]; then
      echo "node: error: $(hostname): nothing answers at $head:$port after $RENDEZVOUS_SECONDS s (the first node's" \
        "rendezvous); open that port between the nodes, or choose another with MASTER_PORT=..." >&2
      exit 2
    fi
    sleep 1
  done
  where=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$head:$port"
    --rdzv-id "${SLURM_JOB_ID:-0}-${SLURM_RESTART_COUNT:-0}"
    --rdzv-conf "join_timeout=$RENDEZVOUS_SECONDS,is_host=$([ "${SLURM_NODEID:-0}" = 0 ] && echo true || echo false)")
fi

# torchrun and its workers ignore SIGUSR1 until they can save. setsid puts them into another session, so that only this
# script signals them.
trap '' USR1
setsid .venv/bin/python -m torch.distributed.run "${where[@]}" --nproc-per-node "$processes" -m gritlm train "$@" &
torchrun=$!
asked=
trap 'asked=yes' USR1 TERM
trap 'kill -TERM $torchrun' HUP
while kill -0 $torchrun 2>/dev/null; do
  # Repeated, because a worker that cannot save yet ignores the signal.
  [ -z "$asked" ] || kill -USR1 $(cat /proc/$torchrun/task/*/children 2>/dev/null) 2>/dev/null
  sleep 1 &
  wait -n $torchrun $! || true
done
code=0; wait $torchrun || code=$?
exit $code
