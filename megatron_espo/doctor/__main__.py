"""``python -m megatron_espo.doctor``."""

from megatron_espo.command_line import run_tool
from megatron_espo.doctor import main

if __name__ == "__main__":
    run_tool(main)
