# Sourced by the 8B scripts. launch SCRIPT [FLAGS] starts SCRIPT's Python part with torchrun, one
# torchrun per node. Environment:
#   PYTHON                  python3
#   GPUS_PER_NODE           ranks of this node; default: what nvidia-smi lists
#   NNODES, RDZV_ENDPOINT   several nodes: their number, and HOST:PORT of one of them
#   RDZV_ID                 name of the job, the same on all nodes
#   MAX_RESTARTS            restarts from the last checkpoint after a rank has failed (0)
#   SAVE_SECONDS            time to save after SIGTERM before torchrun kills its ranks (900)
launch() {
  local script=$1 python=${PYTHON:-python3} gpus=${GPUS_PER_NODE:-} flag rendezvous child="" status=0
  shift
  for flag in "$@"; do
    if [[ $flag == --dry-run ]]; then exec "$python" "$script" "$@"; fi
  done
  if [[ -z $gpus ]]; then gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true); fi
  if ((gpus < 1)); then
    echo "error: nvidia-smi lists no GPU; set GPUS_PER_NODE to start ranks on the CPU, or pass --dry-run." >&2
    exit 2
  fi
  if ((${NNODES:-1} > 1)); then
    if [[ -z ${RDZV_ENDPOINT:-} ]]; then
      echo "error: NNODES is $NNODES; set RDZV_ENDPOINT to HOST:PORT of one node, the same on all nodes." >&2
      exit 2
    fi
    rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT"
      --rdzv-id "${RDZV_ID:-megatron_espo}")
  else
    rendezvous=(--standalone)
  fi
  # What torchrun itself reads; ranks set what they need on their own, however they were started.
  # Ranks that restart must not read the addresses of those that are gone.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}}
  # In a session of its own: what is sent to this script's process group must not reach torchrun.
  setsid "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$gpus" \
    --max-restarts "${MAX_RESTARTS:-0}" "$script" "$@" &
  child=$!
  # The ranks themselves get the signal: they save and leave with status 0, however long it takes,
  # and torchrun does not take it for a failure.
  trap 'pkill -TERM -P "$child" || kill -TERM "$child" || true' TERM INT USR1
  while true; do
    status=0
    wait "$child" || status=$?
    # A trap ends `wait` early: go on until torchrun is gone.
    if ((status <= 128)) || ! kill -0 "$child" 2>/dev/null; then break; fi
  done
  exit "$status"
}
