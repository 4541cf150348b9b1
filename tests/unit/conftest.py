"""Set-up of the unit tests: Megatron without CUDA, and groups of one rank or of threads."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launching import job_of_two_nodes
from torch import Tensor

import megatron_espo.startup  # noqa: F401  as entry points do, before Megatron is imported
from megatron_espo import device

# Before any test module imports Megatron.
device.prepare()

from megatron.core import mpu  # noqa: E402

from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer  # noqa: E402
from megatron_espo.startup.setup import start_anew  # noqa: E402

OnShards = Callable[[Sequence[Tensor], Callable[[Tensor, Any], Any]], list[Any]]


@pytest.fixture(scope="session")
def one_rank() -> Iterator[dist.ProcessGroup]:
    """A gloo group of this process alone: collectives run and change nothing."""
    if dist.is_initialized():
        # A conversion in this process has verified its logits, and left what Megatron needs.
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tokenizer(one_rank: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tokenizer's folder for a module that builds models; Megatron's state ends with it."""
    folder = tmp_path_factory.mktemp("model") / "tokenizer"
    save_tokenizer(byte_tokenizer(), folder)
    _forget_megatron()  # what a conversion in this process has left
    yield str(folder)
    _forget_megatron()


def _forget_megatron() -> None:
    mpu.destroy_model_parallel()
    start_anew()


class ThreadRank:
    """Stands for a process group whose ranks are threads, as one of them sees it."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@pytest.fixture
def on_shards(monkeypatch: pytest.MonkeyPatch) -> OnShards:
    """Run ``function(shard, group)`` for all shards at once; collectives meet at a barrier."""

    def run(shards: Sequence[Tensor], function: Callable[[Tensor, Any], Any]) -> list[Any]:
        size = len(shards)
        barrier = threading.Barrier(size, timeout=20)
        sent: list[Any] = [None] * size
        results: list[Any] = [None] * size

        def exchange(value: Tensor, group: ThreadRank) -> list[Tensor]:
            sent[group.rank()] = value.clone()
            barrier.wait()
            received = [part.clone() for part in sent]
            barrier.wait()
            return received

        def all_gather(gathered: list[Tensor], value: Tensor, group: ThreadRank) -> None:
            for place, received in zip(gathered, exchange(value, group), strict=True):
                place.copy_(received)

        def all_reduce(value: Tensor, op: Any = dist.ReduceOp.SUM, *, group: ThreadRank) -> None:
            received = torch.stack(exchange(value, group))
            value.copy_(received.amax(0) if op == dist.ReduceOp.MAX else received.sum(0))

        def work(rank: int) -> None:
            try:
                results[rank] = function(shards[rank], ThreadRank(rank, size))
            except Exception as error:
                results[rank] = error
                barrier.abort()

        monkeypatch.setattr(dist, "all_gather", all_gather)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [result for result in results if isinstance(result, Exception)]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error  # the cause before those whom it left waiting
        return results

    return run


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a Slurm job of two nodes, both of them this machine."""
    return job_of_two_nodes(tmp_path)
