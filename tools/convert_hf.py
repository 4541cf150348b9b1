"""``megatron-espo convert`` of a checkout."""

from megatron_espo.commands.convert import main
from megatron_espo.startup.setup import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)
