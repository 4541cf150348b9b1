"""What goes to the device in one copy comes out of it as it was."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_espo import transfer
from megatron_espo.transfer import _pack, _unpack, on_device

TENSORS = [
    torch.arange(7).view(7, 1),
    torch.tensor([[True, False, True]]),
    torch.empty(0, dtype=torch.int64),
    torch.rand(3, 5, dtype=torch.float64).t(),
    torch.tensor(2.5),
    torch.rand(33).expand(2, 33),
]


def test_packed_tensors_come_out_as_they_went_in() -> None:
    packed = _pack(TENSORS, pin=False)
    for one, other in zip(TENSORS, _unpack(packed, TENSORS), strict=True):
        assert other.dtype == one.dtype and torch.equal(one, other)
        assert other.data_ptr() % 8 == 0 and other.is_contiguous()
        # A view: taking it out of the piece costs the device nothing.
        assert not one.numel() or other.untyped_storage().data_ptr() == packed.data_ptr()


class Pair(NamedTuple):
    first: Tensor
    name: str


@dataclass(frozen=True)
class Parts:
    pair: Pair
    several: tuple[Tensor, None]
    number: int


def test_a_value_of_many_parts_is_sent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for one with memory of its own."""
    packed: list[int] = []

    def pack(tensors: list[Tensor], *, pin: bool) -> Tensor:
        assert pin
        packed.append(len(tensors))
        return _pack(tensors, pin=False)

    monkeypatch.setattr(transfer, "_pack", pack)
    there = torch.rand(3, device="meta")
    value = Parts(Pair(torch.rand(2, 3), "a"), (torch.tensor([True]), None), 5)
    sent, kept = on_device((value, there), torch.device("meta"))
    assert packed == [2] and kept is there
    assert sent.pair.first.device.type == sent.several[0].device.type == "meta"
    assert sent.pair.first.shape == (2, 3) and sent.several[0].dtype == torch.bool
    assert (sent.pair.name, sent.several[1], sent.number) == ("a", None, 5)


def test_on_a_cpu_nothing_is_copied() -> None:
    value = (torch.rand(2), "x")
    assert on_device(value, torch.device("cpu")) is value
