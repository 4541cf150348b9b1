#!/usr/bin/env bash
# ESPO with cached, parallel rollouts against ESPO with exact ones, on the demo: same base, same
# seed, same blocks of 4; both policies are tested on the held-out split with the exact sampler and
# with the cached one.
#
#   benchmarks/cached_espo.sh [seeds, default: 1 2 3]
#
# Environment: PYTHON (python3), RANKS (2), OUT (runs/cached), POSITIONS (rotary or learned),
# CACHED_ROLLOUTS (rollouts of the cached training, as many as of the exact one by default; a third
# more take the exact one's arithmetic), TEST (problems to test with, the demo's own by default). A
# run that is there is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."

seeds=("$@")
((${#seeds[@]})) || seeds=(1 2 3)
python=${PYTHON:-python3} ranks=${RANKS:-2} out=${OUT:-runs/cached}
positions=${POSITIONS:-rotary}
export OMP_NUM_THREADS=1 PYTHONPATH=${PYTHONPATH:-$PWD}
# The demo's completion of 16 tokens is one block; a cache is used where there are several.
exact=(--rollout-block-length 4)
cached=("${exact[@]}" --rollout-cache dual --rollout-threshold 0.9)
more=()
[[ -z ${CACHED_ROLLOUTS:-} ]] || more=(--espo-num-rollouts "$CACHED_ROLLOUTS")

evaluate() { # CHECKPOINT DATA-FOLDER flags...
  local checkpoint=$1 folder=$2; shift 2
  "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" tools/evaluate.py \
    --load "$checkpoint" --tokenizer-model "$folder/tokenizer" --seq-length 32 \
    --rollout-completion-length 16 --rollout-denoising-steps 16 --rollout-micro-batch-size 128 \
    --espo-task sudoku --espo-eval-data "${TEST:-$folder/data/test.jsonl}" "$@" 2>/dev/null |
    grep '^{"accuracy"'
}

for seed in "${seeds[@]}"; do
  folder=$out/seed$seed
  if [[ ! -e $folder-exact/results.json ]]; then
    examples/run_espo_tiny.sh sudoku --seed "$seed" --out "$folder-exact" --no-control \
      --positions "$positions" -- "${exact[@]}"
  fi
  if [[ ! -e $folder-cached/results.json ]]; then
    examples/run_espo_tiny.sh sudoku --seed "$seed" --out "$folder-cached" --no-control \
      --positions "$positions" --base "$folder-exact" -- "${cached[@]}" "${more[@]}"
  fi
  for run in exact cached; do
    for sampler in exact cached; do
      flags=("${exact[@]}")
      [[ $sampler == exact ]] || flags=("${cached[@]}")
      evaluate "$folder-$run/espo" "$folder-exact" "${flags[@]}" >"$folder-$run/test-by-$sampler.json"
    done
  done
done
"$python" - "$out" "${seeds[@]}" <<'PYTHON'
import json, sys
from pathlib import Path

out, seeds = Path(sys.argv[1]), sys.argv[2:]
print("| seed | trained with | base | tested exactly | tested with cache | reward, exact | reward, cache |")
print("|---|---|---|---|---|---|---|")
for seed in seeds:
    for run in ("exact", "cached"):
        folder = out / f"seed{seed}-{run}"
        base = json.loads((folder / "results.json").read_text())["base"]["accuracy"]
        by = {s: json.loads((folder / f"test-by-{s}.json").read_text()) for s in ("exact", "cached")}
        accuracy = [f"{100 * by[s]['accuracy']:.1f}%" for s in by]
        reward = [f"{by[s]['reward']:.3f}" for s in by]
        print(f"| {seed} | {run} | {100 * base:.1f}% |", " | ".join(accuracy + reward), "|")
PYTHON
