"""``python -m megatron_espo.simulate JOB [JOB ...]``: the process that ``--simulate`` starts."""

import sys

from megatron_espo.simulate.run import main

if __name__ == "__main__":
    main(sys.argv[1:])
