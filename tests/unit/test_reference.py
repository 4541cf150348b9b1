"""The reference policy's copies on the host."""

import gc
import logging

import pytest
import torch
from torch import Tensor

from megatron_espo.rl import pinned
from megatron_espo.rl.pinned import host_copies
from megatron_espo.rl.reference import ReferencePolicy


class Gpus:
    """CUDA's two calls, with a limit of what can be pinned."""

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit = limit
        self.held: dict[int, int] = {}

    def cudaHostRegister(self, place: int, size: int, flags: int) -> int:
        assert flags == 1
        if size > self.limit:
            return 2
        self.held[place] = size
        return 0

    def cudaHostUnregister(self, place: int) -> int:
        del self.held[place]
        return 0


class Owner:
    """Whatever the copies belong to."""

    copies: list[Tensor]


class OnGpu(Tensor):
    """A tensor of the host that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def weights() -> list[Tensor]:
    """The shapes of a layer of LLaDA-8B at tp 2, each side an eighth, in two types."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(512,), (768, 512), (512, 256), (512,), (3072, 512), (512, 768)]
    made = [torch.randn(*shape, generator=generator).bfloat16() for shape in shapes]
    return [*made, torch.randn(3, 5, generator=generator), torch.zeros(0)]


def test_copies_are_contiguous_and_equal_and_of_their_own() -> None:
    originals = weights()
    copies = host_copies(originals, Owner())
    for copy, original in zip(copies, originals, strict=True):
        assert copy.is_contiguous() and copy.dtype == original.dtype
        assert torch.equal(copy, original)
    copies[1].fill_(2.0)
    for i, (copy, original) in enumerate(zip(copies, originals, strict=True)):
        assert torch.equal(copy, original) is (i != 1)


def test_pinned_memory_is_that_of_the_weights_and_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus, owner = Gpus(), Owner()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: gpus)
    originals = [weight.as_subclass(OnGpu) for weight in weights()]
    owner.copies = host_copies(originals, owner)
    (size,) = gpus.held.values()
    needed = sum(t.nbytes for t in originals)
    assert needed <= size <= 1.02 * needed
    # All copies lie inside, on places where the GPU's copies are aligned.
    (start,) = gpus.held
    for copy in owner.copies[:-1]:
        assert start <= copy.data_ptr() and copy.data_ptr() + copy.nbytes <= start + size
        assert (copy.data_ptr() - start) % 512 == 0
    del owner
    gc.collect()
    assert not gpus.held


def test_memory_that_cannot_be_pinned_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus, launches, owner = Gpus(limit=1000), [], Owner()  # type: ignore[var-annotated]
    monkeypatch.setattr(torch.cuda, "cudart", lambda: gpus)
    monkeypatch.setattr(pinned, "_clear_error", lambda: launches.append(1))
    originals = weights()
    with caplog.at_level(logging.WARNING):
        copies = host_copies([weight.as_subclass(OnGpu) for weight in originals], owner)
    assert "could not be pinned (CUDA error 2)" in caplog.text and "ulimit -l" in caplog.text
    assert launches == [1] and not gpus.held
    assert all(torch.equal(*pair) for pair in zip(copies, originals, strict=True))


def test_nothing_is_pinned_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("asked for CUDA")

    monkeypatch.setattr(torch.cuda, "cudart", fail)
    host_copies(weights(), Owner())


def test_policies_change_places_and_mix_bit_for_bit() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3).bfloat16())
    before = [p.detach().clone() for p in model.parameters()]
    reference = ReferencePolicy([model])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    after = [p.detach().clone() for p in model.parameters()]

    def holds(wanted: list[Tensor]) -> bool:
        return all(torch.equal(p, w) for p, w in zip(model.parameters(), wanted, strict=True))

    with reference.in_model():
        assert holds(before)
    assert holds(after)
    reference.mix(0.25)
    with reference.in_model():
        mixed = [(0.25 * a.float() + 0.75 * b.float()).to(a.dtype)
                 for a, b in zip(after, before, strict=True)]  # fmt: skip
        assert holds(mixed)
