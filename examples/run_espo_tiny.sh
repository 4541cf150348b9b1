#!/usr/bin/env bash
# The whole path on two CPU cores: data, fine-tuning of a tiny model from nothing, ESPO, a control
# that spends ESPO's compute on more fine-tuning, and accuracy on a held-out test split.
#
#   examples/run_espo_tiny.sh [sudoku|countdown] [--seed N] [--out DIR] [--base DIR] [--no-control]
#     [--base-only] [--positions rotary|learned] [--lora] [--blocks N] [--experts N]
#     [-- flags for the ESPO run]
#
# --base-only ends with the fine-tuned model. --base DIR starts from the data and the fine-tuned model of an earlier run in DIR. A model with
# rotary positions is a LLaDA and is written as one at the end; learned ones suit so small a model
# better, but fit no Hugging Face folder. With --lora ESPO trains adapters of rank 8 on the base. With
# --blocks N the model is a block-diffusion model of N tokens a block, which is no LLaDA either. With
# --experts N all layers but the first are mixtures as LLaDA2's: N experts and a shared one, of which a
# token passes two and the shared one, as many weights as without; the ranks share the experts.
# Environment: PYTHON (python3), RANKS (2), SMOKE=1 for a run of two minutes that learns nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

task=sudoku seed=1 out="" base="" control=1 base_only=0 positions=rotary lora=() blocks=0 experts=0 sampled=()
while (($#)); do
  case $1 in
    sudoku | countdown) task=$1; shift ;;
    --seed) seed=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --base) base=$2; shift 2 ;;
    --no-control) control=0; shift ;;
    --base-only) base_only=1; shift ;;
    --positions) positions=$2; shift 2 ;;
    --blocks) blocks=$2; shift 2 ;;
    --experts) experts=$2; shift 2 ;;
    --lora) lora=(--lora-rank 8 --lora-alpha 16); shift ;;
    --) shift; break ;;
    *) echo "error: unknown argument $1; see the head of $0." >&2; exit 2 ;;
  esac
done
out=${out:-runs/$task-seed$seed}
python=${PYTHON:-python3} ranks=${RANKS:-2}
export OMP_NUM_THREADS=1 PYTHONPATH=${PYTHONPATH:-$PWD}
source examples/tiny.sh
check_folder .demo
if [[ -n $base && ! -e $base/base/latest_checkpointed_iteration.txt ]]; then
  echo "error: --base $base holds no fine-tuned model of an earlier run of this script." >&2
  exit 2
fi
case $positions in
  # A cell is read by its place, and so small a model learns places slowly from the waves of 6 to
  # 20,000 positions that a rotary base of 10,000 makes; with 10 they are 6 to 47 long, like the
  # sequences.
  rotary) shape=(--rotary-base 10) ;;
  learned) shape=(--position-embedding-type learned_absolute --max-position-embeddings 64) ;;
  *) echo "error: --positions $positions is unknown; choose rotary or learned." >&2; exit 2 ;;
esac
new_folder .demo
started=$SECONDS

# Settings that were tuned on the validation split only: first those of the task.
source examples/tiny_"$task".sh
sft_rate=(--lr 3e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 30)
espo_rate=(--lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 4)
# Adapters begin at no update at all, and want larger steps.
((${#lora[@]})) && espo_rate=(--lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 4)
prompts=32 group=8 updates=2
espo=(--espo-prompts-per-rollout "$prompts" --espo-group-size "$group"
  --espo-updates-per-rollout "$updates" --espo-num-mc 1 --espo-kl-coef 5e-3
  --espo-eval-interval 16 --micro-batch-size 128 --adam-beta2 0.99 --weight-decay 0.01)
# The control gets the compute of ESPO, counted in rows times model passes. Per completion of a
# rollout: one per denoising step, then for the coupled pair of every update one pass of the
# reference, one of the old policy where it is not the current one, and forward and backward,
# which cost three. A fine-tuning step passes 128 rows forward and backward.
passes=$((prompts * group * (completion + 2 * (updates + (updates - 1) + 3 * updates))))
control_iters=$((rollouts * passes / (3 * 128)))
block_length=$completion
if ((blocks)); then
  shape+=(--attention-mask block-causal --block-size "$blocks")
  sampled=(--rollout-cache exact) block_length=$blocks
  # In positions: a step of sampling passes a block, a pair of views takes three rows in place of
  # two, and a fine-tuning row has a noisy copy.
  passes=$((prompts * group * (3 + 3 * (updates + (updates - 1) + 3 * updates))))
  control_iters=$((rollouts * passes / (3 * 128 * 2)))
fi

if ((experts)); then
  shape+=(--num-experts "$experts" --moe-layer-freq "[0,1,1]" --moe-ffn-hidden-size 64
    --moe-shared-expert-intermediate-size 64 --moe-router-topk 2 --moe-router-score-function sigmoid
    --moe-router-num-groups 1 --moe-router-group-topk 1 --moe-router-enable-expert-bias
    --expert-model-parallel-size "$ranks")
fi

if [[ -n ${SMOKE:-} ]]; then # the same path at its smallest, to see that it runs
  sft_iters=6 rollouts=2 control_iters=6
  data=(--train 40 --validation 20 --test 20 --demonstrations 64 --noise 0.5)
  sft_rate=(--lr 3e-3 --lr-warmup-iters 1) espo_rate=(--lr 3e-4 --lr-warmup-iters 1)
fi

if [[ -n $base ]]; then
  say "Data, tokenizer and fine-tuned model of $base"
  cp -r "$base/tokenizer" "$base/data" "$base/base" "$base/sft.log" "$out"
else
  say "Making $task problems and demonstrations of mixed quality"
  "$python" tools/make_tokenizer.py --out "$out/tokenizer"
  "$python" tools/prepare_data.py "$task" --out "$out/data" --seed "$seed" "${data[@]}"
fi

model=(--preset tiny --tokenizer-model "$out/tokenizer" --seq-length "$seq_length" --seed "$seed"
  "${shape[@]}")
sampling=(--rollout-completion-length "$completion" --rollout-block-length "$block_length"
  --rollout-denoising-steps "$completion" --rollout-micro-batch-size 128
  "${sampled[@]}")
sft=(-m megatron_espo.training.pretrain "${model[@]}" --sft-train-data "$out/data/demonstrations.jsonl"
  --sft-completion-length "$completion" --micro-batch-size 64 --global-batch-size 128
  --adam-beta2 0.99 --weight-decay 0.01 --log-interval 50 --save-interval 1000000)

if [[ -z $base ]]; then
  say "Fine-tuning a tiny model from nothing ($sft_iters steps)"
  ranks sft "${sft[@]}" --train-iters "$sft_iters" "${sft_rate[@]}" --save "$out/base" \
    --tensorboard-dir "$out/tensorboard/sft"
fi

if ((base_only)); then exit 0; fi

say "ESPO ($rollouts rollouts)"
ranks espo -m megatron_espo.training.espo "${model[@]}" "${sampling[@]}" --espo-task "$task" \
  --espo-train-data "$out/data/train.jsonl" --espo-eval-data "$out/data/validation.jsonl" \
  --espo-num-rollouts "$rollouts" "${espo[@]}" "${espo_rate[@]}" "${lora[@]}" \
  --pretrained-checkpoint "$out/base" --load "$out/espo" --save "$out/espo" --tensorboard-dir "$out/tensorboard/espo" "$@"

tested=(base espo)
if [[ $positions == rotary && $blocks == 0 && $experts == 0 ]]; then
  say "Writing the model as a LLaDA folder for Hugging Face, $out/hf"
  "$python" tools/convert_hf.py to-hf --megatron "$out/espo" --family llada --out "$out/hf" 2>&1 |
    grep -aE "^error|^$out/hf"
  tested+=(hf)
fi
if ((control)); then
  say "Control: the compute of ESPO spent on more fine-tuning ($control_iters steps)"
  ranks control "${sft[@]}" --train-iters "$control_iters" "${espo_rate[@]}" \
    --pretrained-checkpoint "$out/base" --load "$out/control" --save "$out/control" \
    --tensorboard-dir "$out/tensorboard/control"
  tested+=(control)
fi

say "Held-out test problems, greedy sampling"
for name in "${tested[@]}"; do
  source=(--load "$out/$name" --tokenizer-model "$out/tokenizer")
  [[ $name == hf ]] && source=(--hf "$out/hf" --hf-cache "$out/hf-cache")
  ranks "test-$name" tools/evaluate.py "${source[@]}" \
    --seq-length "$seq_length" "${sampling[@]}" --espo-task "$task" \
    --espo-eval-data "$out/data/test.jsonl" --out "$out/evaluation/$name"
done
"$python" tools/plot_run.py "$out" --title "ESPO on $task, seed $seed"
say "Done: $out/curves.png, TensorBoard: tensorboard --logdir $out/tensorboard"
