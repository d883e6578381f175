#!/usr/bin/env bash
# One node's torchrun, started by train_embonly.sh: node.sh HEAD PORT NODES PROCESSES flags of gritlm train ...
# On SIGUSR1 or SIGTERM the workers save and end: code 0, and run.json says "finished": false. On SIGHUP they end at once.
set -uo pipefail
head=$1 port=$2 nodes=$3 processes=$4
shift 4
RENDEZVOUS_SECONDS=${RENDEZVOUS_SECONDS:-300}
export THP_MEM_ALLOC_ENABLE=${THP_MEM_ALLOC_ENABLE:-1} # torch: large pages on a CPU, some 8% faster
# torch: on a GPU, chunks of ever other shapes leave no holes in its memory
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
[ -t 2 ] || export TQDM_MININTERVAL=${TQDM_MININTERVAL:-10}     # seconds; a progress bar in a log file need not be smooth

cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo "$processes")
[ "$cores" -ge "$processes" ] || echo "node: $(hostname): $cores CPU cores for $processes processes, each with workers" \
  "that tokenise: slow. Under SLURM ask for more, such as --exclusive or --cpus-per-gpu 8" >&2

if [ "$nodes" = 1 ]; then
  where=(--standalone)
else
  started=$SECONDS
  while [ "${SLURM_NODEID:-0}" != 0 ] && ! (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; do
    if [ $((SECONDS - started)) -ge "$RENDEZVOUS_SECONDS" ]; then
      echo "node: error: $(hostname): nothing answers at $head:$port after $RENDEZVOUS_SECONDS s (the first node's" \
        "rendezvous); is that port open between the nodes? Another one: MASTER_PORT=..." >&2
      exit 2
    fi
    sleep 1
  done
  where=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$head:$port"
    --rdzv-id "${SLURM_JOB_ID:-0}-${SLURM_RESTART_COUNT:-0}"
    --rdzv-conf "join_timeout=$RENDEZVOUS_SECONDS,is_host=$([ "${SLURM_NODEID:-0}" = 0 ] && echo true || echo false)")
fi

# torchrun and its workers begin with SIGUSR1 ignored (until they can save), and in a session of their own, so that
# only this script signals them.
trap '' USR1
setsid .venv/bin/python -m torch.distributed.run "${where[@]}" --nproc-per-node "$processes" -m gritlm train "$@" &
torchrun=$!
asked=
trap 'asked=yes' USR1 TERM
trap 'kill -TERM $torchrun' HUP
while kill -0 $torchrun 2>/dev/null; do
  # Asked again until they are ready to hear it.
  [ -z "$asked" ] || kill -USR1 $(cat /proc/$torchrun/task/*/children 2>/dev/null) 2>/dev/null
  sleep 1 &
  wait -n $torchrun $! || true
done
code=0; wait $torchrun || code=$?
exit $code
