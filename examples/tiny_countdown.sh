# Countdown with three numbers for examples/run_espo_tiny.sh: "44,19,35=98:" -> "44+19+35".
# Seven demonstrations in ten miss the target: an operator replaced or two numbers exchanged.
data=(--train 4000 --validation 200 --test 500 --demonstrations 20000 --noise 0.7)
seq_length=40 completion=16
sft_iters=900
rollouts=40
