# Countdown with four numbers up to 9 for examples/run_espo_tiny.sh: "3,5,6,2=4:" -> "3+5-6+2".
# Solutions add and subtract the numbers as they come. Six demonstrations in ten are hasty: they add all
# numbers, whatever the target.
data=(--train 1000 --validation 200 --test 230 --demonstrations 20000 --demonstrations-each 20
  --task-args num_numbers=4 max_number=9 operators=+- ordered=true --noise 0.6)
seq_length=24 completion=8
sft_iters=900
rollouts=48
