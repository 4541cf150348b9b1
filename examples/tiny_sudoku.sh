# 4x4 sudoku for examples/run_espo_tiny.sh: 16 cells in, 16 cells out.
# Six demonstrations in ten are hasty: rows filled in ascending order, columns and boxes ignored.
data=(--train 4000 --validation 200 --test 500 --demonstrations 20000 --noise 0.6)
seq_length=32 completion=16
sft_iters=900
rollouts=48
