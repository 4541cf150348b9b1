"""Memory of the host that a GPU copies to and from directly, of the size that is asked for.

PyTorch's allocator of pinned memory rounds every allocation up to a power of two: copies of an 8B
model's weights would take a quarter more. Here one block of ordinary memory is locked in place.
"""

import logging
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Bytes between the places of two tensors, as in PyTorch's allocator of the GPU.
_ALIGNMENT = 512


def host_copies(tensors: Sequence[Tensor], owner: object) -> list[Tensor]:
    """Copy tensors to the host, into one block; pinned where any of them is on a GPU.

    Args:
        tensors: of any shapes and types.
        owner: the copies are pinned as long as this lives.

    Returns:
        Contiguous copies in the same order.
    """
    sizes = [-(-t.numel() * t.element_size() // _ALIGNMENT) * _ALIGNMENT for t in tensors]
    block = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
    if any(t.is_cuda for t in tensors) and block.numel():
        _pin(block, owner)
    copies = []
    for tensor, place in zip(tensors, block.split(sizes), strict=True):
        used = place[: tensor.numel() * tensor.element_size()]
        copies.append(used.view(tensor.dtype).view(tensor.shape).copy_(tensor))
    return copies


def _pin(block: Tensor, owner: object) -> None:
    """Lock a block's memory as long as its owner lives; where that fails, say so and leave it."""
    runtime, place, size = torch.cuda.cudart(), block.data_ptr(), block.numel()
    # 1: pinned for all contexts of the process.
    error = int(runtime.cudaHostRegister(place, size, 1))
    if error:
        logger.warning(
            "%.1f GB of the host could not be pinned (CUDA error %d): copies to and from the GPU "
            "take longer. Allow the memory to be locked (ulimit -l unlimited, or --ulimit "
            "memlock=-1 for a container).",
            size / 1e9,
            error,
        )
        _clear_error()
        return
    # Holds the block, which must not be freed before.
    weakref.finalize(owner, _unpin, block)


def _unpin(block: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(block.data_ptr())


def _clear_error() -> None:
    """Take CUDA's last error away, which the next kernel's launch would raise as its own."""
    try:
        torch.empty(1, device="cuda").fill_(1.0)
    except RuntimeError:
        logger.debug("the error of the registration is cleared")
