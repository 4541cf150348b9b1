#!/usr/bin/env bash
""":" # bash reads up to the closing quotes, Python what follows them
# Next-block adaptation of an autoregressive model, Qwen3-8B, on .bin/.idx data
# (tools/preprocess_data.py): it becomes a block-diffusion model, docs/blocks.md.
#
#   torchrun --nproc-per-node 8 examples/adapt_8b.sh [FLAGS], or examples/adapt_8b.sh [FLAGS]
#
# Flags as for run_espo_8b.sh; settings in megatron_espo/recipes/adapt_8b.flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "${BASH_SOURCE[0]}" "$@"
":"""

import os
import sys

# The checkout that the script lies in, installed or not.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    from megatron_espo.commands.launch import start

    start(__file__, "pretrain", ["adapt_8b"])
