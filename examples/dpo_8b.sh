#!/usr/bin/env bash
""":" # bash reads up to the closing quotes, Python what follows them
# Preference optimization (DPO) of LLaDA-8B or Dream-7B on JSONL of prompts with a chosen and a
# rejected completion.
#
#   torchrun --nproc-per-node 8 examples/dpo_8b.sh [FLAGS], or examples/dpo_8b.sh [FLAGS]
#
# Flags as for run_espo_8b.sh; settings in megatron_espo/recipes/dpo_8b.flags.
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

    start(__file__, "dpo", ["llada_8b", "dpo_8b"])
