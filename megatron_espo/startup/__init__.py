"""Start-up: the command line and its checks, process groups, what every entry point shares."""

from megatron_espo.device import import_megatron

import_megatron()
