"""``python -m megatron_espo.doctor``."""

import sys

from megatron_espo.doctor import main

if __name__ == "__main__":
    sys.exit(main())
