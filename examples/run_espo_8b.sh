#!/usr/bin/env bash
""":" # bash reads up to the closing quotes, Python what follows them
# ESPO on LLaDA-8B or Dream-7B with the published settings of a task.
#
#   torchrun --nproc-per-node 8 examples/run_espo_8b.sh [FLAGS]
#   examples/run_espo_8b.sh [FLAGS]                  (calls torchrun itself, see launch.sh)
#   sbatch --nodes 2 examples/slurm_espo_8b.sbatch [FLAGS]
#
#   --recipe gsm8k | math | countdown | sudoku | code   the task (gsm8k)
#   --recipe llada_8b | dream_7b                        the model (llada_8b)
#   --recipe lora | lora_80gb | lora_24gb               train adapters (all weights)
#   --dry-run                                           only check and plan; needs no GPU
# All flags of Megatron and of the project work, and win over the recipes: megatron_espo/recipes.
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

    start(__file__, "espo", ["llada_8b", "gsm8k"])
