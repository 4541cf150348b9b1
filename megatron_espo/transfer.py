"""Host to device without a wait: one copy for all tensors of a value.

A plain ``tensor.to(device)`` from pageable memory waits until the device has taken the bytes, and
every small copy costs a launch. What a pass needs is therefore put together in one piece of pinned
memory, sent once, and taken apart on the device by views. On a CPU nothing happens at all.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Bytes: no element type on a device asks for more.
_ALIGNMENT = 64
_WORD = 8


def on_device[Value](value: Value, device: torch.device) -> Value:
    """Send the tensors of a value to a device; the host goes on at once.

    Args:
        value: a tensor, or tuples (named ones, too) and dataclasses of such; whatever else they
            hold is left alone. Tensors are without gradients; those that are there stay.
        device: the target.

    Returns:
        The value with its tensors on the device; on a CPU the value itself.
    """
    if device.type == "cpu":
        return value
    sent: list[Tensor] = []
    _map_tensors(value, lambda t: sent.append(t) if t.device.type == "cpu" else None)
    if not sent:
        return value
    received = iter(_unpack(_pack(sent, pin=True).to(device, non_blocking=True), sent))
    result: Value = _map_tensors(value, lambda t: next(received) if t.device.type == "cpu" else t)
    return result


def _map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Replace each tensor of a value, in a fixed order."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        entries = [_map_tensors(entry, function) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: _map_tensors(getattr(value, field.name), function)
            for field in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **fields)
    return value


def _words(tensor: Tensor) -> int:
    """Words that a tensor takes in a packed piece of memory, the gap after it included."""
    size = tensor.numel() * tensor.element_size()
    return -(-size // _ALIGNMENT) * _ALIGNMENT // _WORD


def _pack(tensors: list[Tensor], *, pin: bool) -> Tensor:
    """Put tensors side by side: int64 ``[words]`` on the host."""
    packed = torch.empty(sum(map(_words, tensors)), dtype=torch.int64, pin_memory=pin)
    data, start = packed.view(torch.uint8), 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        place = data[start : start + size].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        start += _words(tensor) * _WORD
    return packed


def _unpack(packed: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Take tensors of these types and shapes out of what :func:`_pack` made; views."""
    parts = packed.split([_words(tensor) for tensor in tensors])
    return [
        part.view(tensor.dtype)[: tensor.numel()].view(tensor.shape)
        for part, tensor in zip(parts, tensors, strict=True)
    ]
