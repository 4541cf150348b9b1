"""Completes prompts with a checkpoint, or chats; a terminal shows the text filling in.

    python tools/generate.py --load CHECKPOINTS --tokenizer-model DIR --prompt "Once" \
        --rollout-completion-length 64 --rollout-denoising-steps 64 --rollout-temperature 0.7
    python tools/generate.py --hf GSAI-ML/LLaDA-8B-Instruct --chat --bf16
    python tools/generate.py ... --prompt "Once" --save-frames once.gif

With --chat each prompt is a user's message, written in the tokenizer's chat format. Without
--prompt the tool reads what is typed in. See docs/evaluation.md.
"""

<<<<<<< HEAD
import argparse
import sys
from collections.abc import Sequence

import torch

from megatron_espo.arguments import config_from_args
from megatron_espo.config import RolloutConfig
from megatron_espo.data.tokenizer import decode_completion, encode_prompt, load_tokenizer
from megatron_espo.generation.sampler import generate
from megatron_espo.training.inference import load_model
from megatron_espo.training.setup import run_entry_point


def main(argv: Sequence[str]) -> None:
    """Complete the prompts given with --prompt; every other flag is passed on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompt", nargs="+", default=[""])
    parser.add_argument("--chat", action="store_true")
    own, rest = parser.parse_known_args(argv)
    model, args = load_model(rest)
    tokenizer = load_tokenizer(args.tokenizer_model)
    config = config_from_args(RolloutConfig, args)
    prompts = [
        encode_prompt(tokenizer, [{"role": "user", "content": text}] if own.chat else text)
        for text in own.prompt
    ]
    room = args.seq_length - config.completion_length
    for number, ids in enumerate(prompts, start=1):
        if len(ids) > room:
            raise ValueError(
                f"--prompt {number} has {len(ids)} tokens and {room} fit; raise --seq-length or "
                "lower --rollout-completion-length."
            )
    result = generate(
        model,
        prompts,
        torch.arange(len(prompts)),
        config,
        args.seed,
        "generate",
    )
    if model.layout.is_reporter:
        print(
            f"{result.num_evaluations.double().mean():.1f} model evaluations per completion, "
            f"{result.tokens_per_step.mean():.2f} tokens per evaluation, "
            f"mean confidence {result.mean_confidence.mean():.3f}",
            file=sys.stderr,
        )
        for prompt, ids in zip(own.prompt, result.completions.tolist(), strict=True):
            print(
                f"{prompt}\033[1m{decode_completion(tokenizer, ids, model.stop_token_ids)}\033[0m"
            )


=======
from megatron_espo.training.generate import main
from megatron_espo.training.setup import run_entry_point

>>>>>>> 4d9f099 (Dashboard: grouped charts, histograms, warnings, hardware, MFU; comparison of runs; generation that shows text filling in)
if __name__ == "__main__":
    run_entry_point(main)
