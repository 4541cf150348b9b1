"""``megatron-espo prepare`` of a checkout."""

from megatron_espo.command_line import run_tool
from megatron_espo.commands.prepare_data import main

if __name__ == "__main__":
    run_tool(main)
