# Countdown with three numbers for examples/run_espo_tiny.sh: "44,19,35=98:" -> "44+19+35".
data=(--train 4000 --validation 200 --test 500 --demonstrations 20000 --noise 0.7)
seq_length=40 completion=16 steps=16
shape=(--position-embedding-type learned_absolute --max-position-embeddings 64)
sft_iters=600 sft_rate=(--lr 3e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 30)
rollouts=64
espo=(--espo-prompts-per-rollout 32 --espo-group-size 8 --espo-updates-per-rollout 2
  --espo-num-mc 1 --espo-kl-coef 5e-3 --espo-gradient joint --micro-batch-size 128
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 4 --adam-beta2 0.99
  --weight-decay 0.01 --clip-grad 1.0 --espo-eval-interval 16)
# The arithmetic of tiny_sudoku.sh: 8,704 row passes per rollout, 384 per fine-tuning step.
control_iters=$((rollouts * 8704 / 384))
control_rate=(--lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 4)
