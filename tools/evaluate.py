"""Evaluates a checkpoint on a task: completions, accuracy with an interval, reward, pass@k.

    torchrun --nproc-per-node 8 tools/evaluate.py --load runs/espo --espo-task gsm8k \
        --espo-eval-data test.jsonl --eval-lengths 128 256 512 --out runs/espo-gsm8k --bf16
    python tools/evaluate.py --hf GSAI-ML/LLaDA-8B-Instruct ...

Runs under torchrun like training does, or alone. The same command takes up what a killed one has
finished in --out. See docs/evaluation.md.
"""

from megatron_espo.commands.evaluate import main
from megatron_espo.startup.setup import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)
