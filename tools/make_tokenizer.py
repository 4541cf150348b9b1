"""``megatron-espo make-tokenizer`` of a checkout."""

from megatron_espo.command_line import run_tool
from megatron_espo.commands.make_tokenizer import main

if __name__ == "__main__":
    run_tool(main)
