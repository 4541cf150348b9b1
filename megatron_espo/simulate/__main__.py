"""``python -m megatron_espo.simulate PARENT JOB [JOB ...]``: what ``--simulate`` starts.

It ends with its parent, whose process id it is told, however that one ends.
"""

import sys

from megatron_espo.rewards.worker import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))

    from megatron_espo.simulate.run import main

    main(sys.argv[2:])
