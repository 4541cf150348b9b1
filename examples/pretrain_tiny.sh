#!/usr/bin/env bash
# Pre-trains a tiny masked-diffusion model on plain text, through the path that 8B pre-training
# takes (Megatron's indexed data, pretrain(), torch_dist checkpoints), and samples from it.
#
#   examples/pretrain_tiny.sh [--text FOLDER] [--out DIR] [-- Megatron flags]
#
# Without --text it reads the project's own documents. Environment: PYTHON (python3), RANKS (2).
set -euo pipefail
cd "$(dirname "$0")/.."

text=() out=runs/pretrain-tiny
while (($#)); do
  case $1 in
    --text) text=("$2"); shift 2 ;;
    --out) out=$2; shift 2 ;;
    --) shift; break ;;
    *) echo "error: unknown argument $1; see the head of $0." >&2; exit 2 ;;
  esac
done
((${#text[@]})) || text=(README.md docs megatron_espo)
python=${PYTHON:-python3}
export OMP_NUM_THREADS=1 PYTHONPATH=${PYTHONPATH:-$PWD}
if [[ -e $out || -L $out ]] && [[ ! -d $out || (-n $(ls -A "$out") && ! -e $out/.pretrain-tiny) ]]; then
  echo "error: --out $out is not empty and holds no earlier run of this script; choose another." >&2
  exit 2
fi
rm -rf "$out" && mkdir -p "$out" && touch "$out/.pretrain-tiny"

"$python" tools/make_tokenizer.py --out "$out/tokenizer"
"$python" tools/preprocess_data.py --input "${text[@]}" --ext .md .txt .py \
  --tokenizer-model "$out/tokenizer" --output-prefix "$out/text"
"$python" -m torch.distributed.run --standalone --nproc-per-node "${RANKS:-2}" \
  -m megatron_espo.training.pretrain --preset tiny --tokenizer-model "$out/tokenizer" \
  --data-path "$out/text" --split 95,5,0 --seq-length 128 --micro-batch-size 8 \
  --global-batch-size 32 --train-iters 400 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine \
  --lr-warmup-iters 20 --adam-beta2 0.98 --weight-decay 0.01 --log-interval 20 \
  --eval-interval 100 --eval-iters 4 --save "$out/checkpoint" \
  --tensorboard-dir "$out/tensorboard" "$@" 2>&1 | tee "$out/pretrain.log" |
  grep -E --line-buffered '^error|iteration +[0-9]+/|validation loss|^\[rank[0-9]+\]: [A-Za-z.]*Error' |
  sed -u -E 's/consumed samples.*learning rate/learning rate/; s/global batch size.*lm loss/lm loss/; s/ \| loss scale.*//'
"$python" tools/generate.py --load "$out/checkpoint" --tokenizer-model "$out/tokenizer" \
  --prompt "The " "def " "Masked diffusion " --rollout-completion-length 96 \
  --rollout-block-length 32 --rollout-denoising-steps 96 --rollout-temperature 0.5 \
  2>"$out/generate.log" || { grep '^error' "$out/generate.log" >&2; exit 1; }
