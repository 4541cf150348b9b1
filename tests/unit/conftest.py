"""Set-up of the unit tests: Megatron without CUDA, and a process group of one rank."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron_espo import device

# Before any test module imports Megatron.
device.prepare()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[dist.ProcessGroup]:
    """A gloo group of this process alone: collectives run and change nothing."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
