"""Start-up: the command line and its checks, process groups, what every entry point shares."""

import gc

# Imports make objects by the hundred thousand, none of which is garbage: looking through them again
# and again takes half a second.
_collects = gc.isenabled()
gc.disable()
try:
    from megatron_espo.device import import_megatron

    import_megatron()
finally:
    if _collects:
        gc.enable()
