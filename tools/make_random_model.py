"""``megatron-espo make-random-model`` of a checkout."""

from megatron_espo.commands.make_random_model import main
from megatron_espo.startup.setup import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)
