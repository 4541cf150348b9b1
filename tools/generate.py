"""Completes prompts with a checkpoint, or chats; a terminal shows the text filling in.

    python tools/generate.py --load CHECKPOINTS --tokenizer-model DIR --prompt "Once" \
        --rollout-completion-length 64 --rollout-denoising-steps 64 --rollout-temperature 0.7
    python tools/generate.py --hf GSAI-ML/LLaDA-8B-Instruct --chat --bf16
    python tools/generate.py ... --prompt "Once" --save-frames once.gif

With --chat each prompt is a user's message, written in the tokenizer's chat format. Without
--prompt the tool reads what is typed in. See docs/evaluation.md.
"""

from megatron_espo.commands.generate import main
from megatron_espo.startup.setup import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)
