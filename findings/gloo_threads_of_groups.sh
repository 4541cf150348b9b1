#!/usr/bin/env bash
# Megatron-Core 0.19.2 on gloo (PyTorch 2.15.0): threads of process groups, in one process alone.
#
# Expected: a process that waits does nothing, and what destroy_model_parallel() ends is gone.
# Seen: initialize_model_parallel() makes dozens of groups of the one rank. Each gloo group starts
# three threads, and one of them wakes up about a hundred times a second for as long as the group
# lives. destroy_model_parallel() forgets all but a few of the groups, so that their threads stay,
# and the next initialize_model_parallel() adds as many again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet megatron-core==0.19.2 torch==2.15.0 numpy==2.5.5 psutil==7.2.2
CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"
import resource
import time

import torch.distributed as dist
from megatron.core import parallel_state


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def idle_wakeups(seconds: float) -> float:
    """Voluntary context switches a second of this process while it sleeps."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw, time.monotonic()
    time.sleep(seconds)
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before
    return switches / (time.monotonic() - start)


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
alone, quiet = threads(), idle_wakeups(3)
registered = dist.distributed_c10d._world.pg_map
parallel_state.initialize_model_parallel()
groups, first, woken = len(registered) - 1, threads() - alone, idle_wakeups(3) - quiet
parallel_state.destroy_model_parallel()
left = threads() - alone
parallel_state.initialize_model_parallel()
second = threads() - alone
print(f"{groups} groups of one rank: {first} threads more, {woken:.0f} wakeups a second while idle")
print(f"after destroy_model_parallel: {left} of them; after the next start-up: {second}")
assert groups > 20 and first == 3 * groups, (groups, first)
# A busy machine wakes them less often.
assert 30 * groups < woken < 150 * groups, woken
assert 0.8 * first < left < first and second > 1.7 * first, (left, second)
os._exit(0)
PYTHON
echo "as described"
