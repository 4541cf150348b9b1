#!/usr/bin/env bash
# Pre-trains a tiny masked-diffusion model on plain text, through the path that 8B pre-training
# takes (Megatron's indexed data, pretrain(), torch_dist checkpoints), and samples from it.
#
#   examples/pretrain_tiny.sh [--text PATH ...] [--out DIR] [-- Megatron flags]
#
# PATH is a file or a folder, of whose files all are read that hold text. Without --text it reads the
# project's own documents. Environment: PYTHON (python3), RANKS (2).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

text=() out="$root/runs/pretrain-tiny"
while (($#)); do
  case $1 in
    --text)
      shift
      while (($#)) && [[ $1 != --* ]]; do text+=("$(realpath -m "$1")"); shift; done
      ;;
    --out) out=$(realpath -ms "$2"); shift 2 ;;
    --) shift; break ;;
    *) echo "error: unknown argument $1; see the head of $0." >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3}
source "$root/examples/tiny.sh"
begin_with_text .pretrain-tiny

prepare_text "${text[@]}"
# So few pages leave none to validate on.
split=(--split 95,5,0 --eval-interval 100 --eval-iters 4)
((pages >= 40)) || split=(--split 100,0,0 --eval-iters 0)
status=0
"$python" -m torch.distributed.run --standalone --nproc-per-node "${RANKS:-2}" \
  -m megatron_espo.training.pretrain --preset tiny --tokenizer-model "$out/tokenizer" \
  --data-path "$out/text" "${split[@]}" --seq-length 128 --micro-batch-size 8 \
  --global-batch-size 32 --train-iters 600 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine \
  --lr-warmup-iters 20 --adam-beta2 0.98 --weight-decay 0.01 --log-interval 20 \
  --save "$out/checkpoint" --tensorboard-dir "$out/tensorboard" "$@" \
  2>"$out/pretrain.log" || status=$?
if ((status)); then # torchrun's report is long; the sentence is what counts
  grep -E '^error|^\[rank[0-9]+\]: [A-Za-z.]*Error' "$out/pretrain.log" >&2 || tail -n 20 "$out/pretrain.log" >&2
  exit "$status"
fi
"$python" tools/generate.py --load "$out/checkpoint" --tokenizer-model "$out/tokenizer" \
  --prompt "The " "def " "Masked diffusion " --rollout-completion-length 48 \
  --rollout-block-length 16 --rollout-denoising-steps 48 --rollout-remasking random \
  --rollout-temperature 0.6
