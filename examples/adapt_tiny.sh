#!/usr/bin/env bash
# From an autoregressive model to block diffusion, on one CPU core in about ten minutes: a tiny
# autoregressive model is trained on plain text from nothing and becomes a block-diffusion model by
# next-block adaptation (docs/blocks.md). Beside it block diffusion from nothing: with as many passes
# of sequences as the adaptation, with as many as the autoregressive training and it together, and
# with the next-token loss that the adaptation has, too. At the end the held-out loss of each (the
# bound of block diffusion, which in blocks of one token is the autoregressive loss) and a sample.
#
#   examples/adapt_tiny.sh [--text PATH ...] [--seed N] [--out DIR]
#
# PATH is a file or a folder, of whose files all are read that hold text. Without --text it reads the
# project's own documents. Environment: PYTHON (python3), RANKS (1), SMOKE=1 for a run of a minute
# that learns nothing.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

text=() seed=1 out=""
while (($#)); do
  case $1 in
    --text)
      shift
      while (($#)) && [[ $1 != --* ]]; do text+=("$(realpath -m "$1")"); shift; done
      ;;
    --seed) seed=$2; shift 2 ;;
    --out) out=$(realpath -ms "$2"); shift 2 ;;
    *) echo "error: unknown argument $1; see the head of $0." >&2; exit 2 ;;
  esac
done
out=${out:-$root/runs/adapt-seed$seed}
python=${PYTHON:-python3} ranks=${RANKS:-1} started=$SECONDS
source "$root/examples/tiny.sh"
begin_with_text .adapt-tiny

# The rate was chosen on seed 4: docs/measurements/2026-11-30.md.
block=8 batch=32 ar_steps=300 adapt_steps=150 growth=30 drawn=40 sampled=48
rate=(--lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20)
if [[ -n ${SMOKE:-} ]]; then # the same path at its smallest, to see that it runs
  batch=4 ar_steps=2 adapt_steps=4 growth=1 drawn=1 sampled=8
  rate=(--lr 3e-3)
fi

say "Making a tokenizer and training data"
prepare_text "${text[@]}"
if ((pages < 40)); then
  echo "error: --text: $pages pages are too few to leave some to validate on; give 40 or more." >&2
  exit 2
fi

# exact_count is unbiased, and masks a block of one token always: then it is autoregressive. Rows
# that are cut short would be a difference more.
model=(-m megatron_espo.training.pretrain --preset tiny --tokenizer-model "$out/tokenizer"
  --data-path "$out/text" --split 95,5,0 --seq-length 128 --seed "$seed" --logit-shift
  --attention-mask context-causal --forward-process exact_count --random-length-probability 0
  --micro-batch-size $((batch / ranks)) --global-batch-size "$batch" --eval-iters "$drawn")
# The last step's model is measured: the same held-out rows and masks for all.
train() { # NAME STEPS FLAGS
  local name=$1 steps=$2; shift 2
  ranks "$name" "${model[@]}" --train-iters "$steps" --adam-beta2 0.98 --weight-decay 0.01 \
    --log-interval 50 --eval-interval $((steps + 1)) --save "$out/$name" "$@"
}

say "(a) An autoregressive model from nothing: blocks of one token ($ar_steps steps of $batch rows)"
train autoregressive "$ar_steps" --block-size 1 "${rate[@]}"
say "The same in blocks of $block, as it is"
ranks as-it-is "${model[@]}" --block-size "$block" --skip-train \
  --pretrained-checkpoint "$out/autoregressive"
say "(b) Next-block adaptation of it: blocks grow to $block ($adapt_steps steps)"
train adapted "$adapt_steps" --block-size 1 --block-growth-to "$block" \
  --block-growth-interval "$growth" --next-token-weight 0.5 "${rate[@]}" \
  --pretrained-checkpoint "$out/autoregressive"
say "(c) Block diffusion from nothing, with the passes of b"
train nothing-b "$adapt_steps" --block-size "$block" "${rate[@]}"
say "(d) Block diffusion from nothing, with the passes of a and b together"
train nothing-ab $((ar_steps + adapt_steps)) --block-size "$block" "${rate[@]}"
say "(e) The same with the next-token loss that the adaptation has"
train nothing-ab-next $((ar_steps + adapt_steps)) --block-size "$block" --next-token-weight 0.5 \
  "${rate[@]}"

say "Samples"
for name in autoregressive adapted nothing-b nothing-ab nothing-ab-next; do
  size=$block
  if [[ $name == autoregressive ]]; then size=1; fi
  printf '\n--- %s\n' "$name"
  "$python" tools/generate.py --load "$out/$name" --tokenizer-model "$out/tokenizer" \
    --prompt "The " "def " "Masked diffusion " --rollout-completion-length "$sampled" \
    --rollout-block-length "$size" --rollout-denoising-steps "$sampled" --rollout-remasking random \
    --rollout-temperature 0.6 --rollout-cache exact --seed "$seed" 2>"$out/sample-$name.log" |
    tee "$out/sample-$name.txt"
done

say "Held-out loss, nats per token"
"$python" - "$out" "$block" $((batch * ar_steps)) $((batch * adapt_steps)) <<'PYTHON'
import json, re, sys
from pathlib import Path

out, block, a, b = Path(sys.argv[1]), *map(int, sys.argv[2:])
def held_out(log: str, term: str) -> float:
    return float(re.findall(rf"\| {term} value: (\S+)", (out / f"{log}.log").read_text())[-1])

def both(log: str) -> tuple[float, float]:
    return held_out(log, "diffusion loss"), held_out(log, "next-token loss")

results = {
    "autoregressive": (a, held_out("as-it-is", "lm loss"), held_out("autoregressive", "lm loss")),
    "adapted": (a + b, *both("adapted")),
    "nothing-b": (b, held_out("nothing-b", "lm loss"), None),
    "nothing-ab": (a + b, held_out("nothing-ab", "lm loss"), None),
    "nothing-ab-next": (a + b, *both("nothing-ab-next")),
}
shown = {
    "autoregressive": "(a) autoregressive",
    "adapted": "(b) a, adapted",
    "nothing-b": "(c) block diffusion from nothing",
    "nothing-ab": "(d) the same with more passes",
    "nothing-ab-next": "(e) d, with the next-token loss",
}
print(f"| model | rows passed | blocks of {block} | next token |\n|---|---|---|---|")
for name, (rows, loss, following) in results.items():
    last = "" if following is None else f"{following:.3f}"
    print(f"| {shown[name]} | {rows:,} | {loss:.3f} | {last} |")
keys = ("rows", "loss", "next_token_loss")
named = {name: dict(zip(keys, values)) for name, values in results.items()}
(out / "results.json").write_text(json.dumps(named, indent=2) + "\n")
PYTHON
say "Done: $out/results.json"
