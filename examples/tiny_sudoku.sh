# 4x4 sudoku for examples/run_espo_tiny.sh: 16 cells in, 16 cells out.
data=(--train 4000 --validation 200 --test 500 --demonstrations 20000 --noise 0.7)
seq_length=32 completion=16 steps=16
# A grid is read by absolute place; rotary positions alone make a model of this size learn slowly.
shape=(--position-embedding-type learned_absolute --max-position-embeddings 64)
sft_iters=500 sft_rate=(--lr 3e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 30)
rollouts=64
espo=(--espo-prompts-per-rollout 32 --espo-group-size 8 --espo-updates-per-rollout 2
  --espo-num-mc 1 --espo-kl-coef 5e-3 --espo-gradient joint --micro-batch-size 128
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 4 --adam-beta2 0.99
  --weight-decay 0.01 --clip-grad 1.0 --espo-eval-interval 16)
# One rollout passes 256 x 16 rows forward to sample, 512 for the old policy, 1,024 for the
# reference, and 2 x 512 forward and backward (three times a forward pass): 8,704 row passes.
# A fine-tuning step passes 128 rows forward and backward: 384. So 22.7 steps per rollout.
control_iters=$((rollouts * 8704 / 384))
control_rate=(--lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 4)
