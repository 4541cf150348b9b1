"""The reference policy: what the model is pulled towards by the KL penalty.

Where all weights are trained it is a second set of them, which visits the model when its ELBO is
needed. Each rank keeps a copy of its own parameters, and of what else decides a result (the biases
of experts), on the host where there is a GPU. For an ELBO pass the copy and the model's own change
places bit for bit; the optimizer's float32 master weights are not touched.

Where LoRA adapters are trained it is their base: the model with the adapters off. Nothing is kept,
copied or moved.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_espo.adapters.attach import adapters_of, without_adapters
from megatron_espo.errors import UserError
from megatron_espo.rl.pinned import host_copies


class Reference(Protocol):
    """What a run asks of its reference policy."""

    def in_model(self) -> contextlib.AbstractContextManager[None]:
        """Let the model compute as the reference does inside the context."""

    def mix(self, share: float) -> None:
        """Move towards the policy by a share of it."""

    def save(self, folder: str) -> None:
        """Write what a run needs to find it again."""

    def load(self, folder: str) -> None:
        """Read what :meth:`save` wrote."""


def reference_policy(chunks: Sequence[torch.nn.Module]) -> Reference:
    """Take a model as it is now, or the base of its adapters, for the reference.

    Args:
        chunks: this rank's model chunks.

    Returns:
        The reference policy.
    """
    return AdapterBase(chunks) if adapters_of(chunks) else ReferencePolicy(chunks)


class AdapterBase:
    """The base under a model's adapters as the reference policy."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Remember the model.

        Args:
            chunks: this rank's model chunks.
        """
        self._chunks = list(chunks)

    def in_model(self) -> contextlib.AbstractContextManager[None]:
        """Turn the adapters off inside the context."""
        return without_adapters(self._chunks)

    def mix(self, share: float) -> None:
        """Refuse: a mix with the policy would have to keep adapters of its own."""
        raise NotImplementedError("the base of adapters does not move")

    def save(self, folder: str) -> None:
        """Write nothing: a checkpoint of adapters names its base."""

    def load(self, folder: str) -> None:
        """Read nothing: the base was read when the model was built."""


def _decisive(chunk: torch.nn.Module) -> list[Tensor]:
    """The parameters, and the buffers that a checkpoint keeps."""
    buffers = [
        buffer
        for module in chunk.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    return [p.data for p in chunk.parameters()] + [b.data for b in buffers]


class ReferencePolicy:
    """Weights of the reference policy on this rank."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Copy the model's weights.

        Args:
            chunks: this rank's model chunks.
        """
        self._chunks = list(chunks)
        self._weights = host_copies(self._parameters(), self)

    def _parameters(self) -> list[Tensor]:
        return [tensor for chunk in self._chunks for tensor in _decisive(chunk)]

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Let the model hold the reference weights inside the context.

        The distributed optimizer's parameter-gather hooks must be off.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        parameters = self._parameters()
        for ours, theirs in zip(parameters, self._weights, strict=True):
            kept = ours.clone()
            # The copies between host and device follow each other on one stream: the host need not
            # wait for each.
            ours.copy_(theirs, non_blocking=True)
            theirs.copy_(kept, non_blocking=True)
        if any(ours.is_cuda for ours in parameters):
            torch.cuda.current_stream().synchronize()

    def mix(self, share: float) -> None:
        """Move towards the policy: ref <- share * policy + (1 - share) * ref, in float32.

        The distributed optimizer's parameter-gather hooks must be off, here as for a swap.

        Args:
            share: the policy's share a (0.6 in ESPO).
        """
        for ours, theirs in zip(self._parameters(), self._weights, strict=True):
            # On the model's device: a host's cores would take seconds for billions of weights.
            reference = theirs.to(ours.device, torch.float32)
            theirs.copy_(share * ours.float() + (1.0 - share) * reference)

    def save(self, folder: str) -> None:
        """Write the weights as a torch_dist checkpoint that any layout can read.

        Args:
            folder: made if missing; written by all ranks together.
        """
        if torch.distributed.get_rank() == 0:
            os.makedirs(folder, exist_ok=True)
        torch.distributed.barrier()
        with self.in_model():
            dist_checkpointing.save(self._sharded_state(), folder)

    def load(self, folder: str) -> None:
        """Read weights that :meth:`save` wrote, possibly in another layout.

        Args:
            folder: the checkpoint.

        Raises:
            UserError: if it is missing.
        """
        if not os.path.isdir(folder):
            raise UserError(
                f"{folder}: the checkpoint has no reference policy; resume with --espo-kl-coef 0 "
                "or start from --pretrained-checkpoint."
            )
        with self.in_model():
            state = dist_checkpointing.load(self._sharded_state(), folder)
            for name, chunk in self._named_chunks():
                chunk.load_state_dict(state[name])

    def _named_chunks(self) -> list[tuple[str, Any]]:
        chunks = unwrap_model(self._chunks)
        return [(f"model{i}" if len(chunks) > 1 else "model", c) for i, c in enumerate(chunks)]

    def _sharded_state(self) -> dict[str, object]:
        return {name: chunk.sharded_state_dict() for name, chunk in self._named_chunks()}
