# What train_embonly.sh asks the machine: which Python, which GPUs, which nodes. It has to run under bash 3.2 (macOS).

# Sets `python` and says which one it is: PYTHON as it is; the active environment (venv, conda, module, container), if
# it has all dependencies; else .venv. Nothing is installed into any other environment.
choose_python() {
  local check=$root/scripts/training/check_python.py why= lacks= candidate
  python=${PYTHON:-}
  if [ -n "$python" ]; then
    command -v "$python" >/dev/null || fail "PYTHON=$python: no such program"
    why="as PYTHON says"
    lacks=$("$python" "$check" 2>&1) || why="$why, although it lacks something: $(tail -n 1 <<<"$lacks")"
  else
    for candidate in python3 python; do
      command -v $candidate >/dev/null || continue
      if lacks=$($candidate "$check" 2>&1); then
        python=$(command -v $candidate) why="the active one, which has all dependencies"
        break
      fi
      why=${why:-"; not the active $(command -v $candidate): $(tail -n 1 <<<"$lacks")"}
    done
  fi
  if [ -z "$python" ]; then
    bash "$root/scripts/setup.sh"
    python=$root/.venv/bin/python why="of this checkout$why"
  fi
  echo "train_embonly: python $python ($why)"
  # It finds the gritlm of this checkout, and takes no module from the caller's folder.
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
}

# Sets `processes`, the number of GPUs; 0 for the CPU. Refuses GPUs whose memory is in use.
count_gpus() {
  processes=0
  [ "$GPUS" != none ] || return 0
  export CUDA_DEVICE_ORDER=PCI_BUS_ID  # the order of nvidia-smi
  if [ -n "$GPUS" ]; then
    export CUDA_VISIBLE_DEVICES=$GPUS
    [ -z "${HIP_VISIBLE_DEVICES:-}" ] || export HIP_VISIBLE_DEVICES=$GPUS
  fi
  local listed words free total
  listed=$("$python" -m gritlm devices 2>/dev/null) ||
    fail "$("$python" -m gritlm devices 2>&1 | tail -n 1 | sed 's/^gritlm: error: //')"
  while IFS=$', \t' read -r -a words; do  # index, name, free MiB, total MiB
    [ ${#words[@]} -gt 0 ] || continue
    [ ${#words[@]} -gt 2 ] || fail "gritlm devices: found '${words[*]}', wanted index, name, free MiB, total MiB"
    processes=$((processes + 1)) free=${words[${#words[@]} - 2]} total=${words[${#words[@]} - 1]}
    case $free$total in
      *N/A*) echo "train_embonly: GPU ${words[0]}: its free memory is not known, so it is not checked" ;;
      *[!0-9]*) fail "gritlm devices: found '${words[*]}', wanted index, name, free MiB, total MiB" ;;
      *) [ $((100 * free)) -ge $((total * MIN_FREE_GPU_PERCENT)) ] || fail "GPU ${words[0]} has $free of $total MiB" \
        "free, wanted $MIN_FREE_GPU_PERCENT%; choose others with GPUS=..., or lower MIN_FREE_GPU_PERCENT" ;;
    esac
  done <<<"$listed"
  [ $processes = 0 ] || return 0
  [ -z "$GPUS" ] || fail "GPUS=$GPUS: found no GPU (gritlm devices)"
  local granted=${SLURM_JOB_GPUS:-}${SLURM_STEP_GPUS:-}
  [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || granted=$SLURM_GPUS_ON_NODE
  [ -z "$granted" ] || fail "SLURM granted GPUs ($granted), and $python finds none on $HOSTNAME (gritlm devices);" \
    "GPUS=none trains on the CPU"
}

# Sets `nodes`, `launch` (srun and its flags) and `where` (flags of torchrun).
find_nodes() {
  nodes=1 launch=() where=(--standalone)
  [ -n "$slurm" ] || return 0
  nodes=${SLURM_NNODES:-1}
  if command -v srun >/dev/null; then
    launch=(srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=1)
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || launch+=(--cpus-per-task "$SLURM_CPUS_PER_TASK")  # srun does not inherit it
  else
    [ "$nodes" = 1 ] || fail "found no srun for a job of $nodes nodes"
    echo "train_embonly: found no srun; training without it on $HOSTNAME"
  fi
  [ "$nodes" != 1 ] || return 0
  # The first node's address. A compute node may be forbidden to ask scontrol.
  local head=${MASTER_ADDR:-} address=
  if [ -z "$head" ]; then
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null | head -n 1) || true
    [ -z "$head" ] || address=$(scontrol show node "$head" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') || true
    [ -n "$head" ] || head=${SLURMD_NODENAME:-} # of a batch job: the first node
    [ -n "$head" ] || head=$(srun --nodes 1 --ntasks 1 --relative 0 hostname 2>/dev/null) || true
    [ -n "$head" ] || fail "neither scontrol nor srun tells the first node of $SLURM_JOB_NODELIST; set MASTER_ADDR=..."
  fi
  # Each job has its own port, below the ports that the system gives to connections.
  local port=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
  case $port in *[!0-9]*) fail "MASTER_PORT=$port: wanted a number" ;; esac
  where=(--nnodes "$nodes" --rdzv-endpoint "${address:-$head}:$port"
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}")
}
