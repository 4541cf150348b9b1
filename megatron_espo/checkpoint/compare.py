"""Reads and compares torch_dist checkpoints without building a model."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_espo.checkpoint.tracker import (
    iteration_folder,
    latest_checkpoint,
    reference_folder,
)
from megatron_espo.errors import UserError


def latest_iteration(root: str) -> int:
    """Read which iteration of a --save folder is the latest.

    Args:
        root: the folder.

    Returns:
        The iteration.

    Raises:
        UserError: There is no checkpoint.
    """
    try:
        return int(latest_checkpoint(root))
    except (OSError, ValueError) as error:
        raise UserError(f"{root}: no checkpoint there ({error}).") from error


def checkpoint_tensors(root: str, iteration: int | None = None) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint: weights, optimizer state, ESPO's reference policy.

    Args:
        root: a --save folder.
        iteration: which one; the latest if None.

    Returns:
        Whole tensors by name, the same names and shapes for every layout that wrote them.

    Raises:
        UserError: There is no checkpoint.
    """
    iteration = latest_iteration(root) if iteration is None else iteration
    tensors = dict(_flatten("", _read(iteration_folder(root, iteration))))
    reference = reference_folder(root, iteration)
    if os.path.isdir(reference):
        tensors |= dict(_flatten("reference", _read(reference)))
    return tensors


def _read(folder: str) -> dict[str, Any]:
    state: dict[str, Any] = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(folder),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return state


def _flatten(prefix: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(f"{prefix}/{key}", item)


def unequal_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Name the tensors that differ in any bit, or that only one side has."""
    names = sorted(ours.keys() | theirs.keys())
    return [
        name
        for name in names
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]
