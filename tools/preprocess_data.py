"""``megatron-espo preprocess`` of a checkout."""

from megatron_espo.command_line import run_tool
from megatron_espo.commands.preprocess import main

if __name__ == "__main__":
    run_tool(main)
