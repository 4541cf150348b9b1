# Countdown with three numbers up to 20 for examples/run_espo_tiny.sh: "2,10,7=15:" -> "7-2+10".
# Solutions add and subtract. Seven demonstrations in ten miss the target: an operator replaced or
# two numbers exchanged.
data=(--train 2000 --validation 200 --test 500 --demonstrations 20000 --demonstrations-each 10
  --task-args max_number=20 operators=+- --noise 0.7)
seq_length=32 completion=12
sft_iters=900
rollouts=48
