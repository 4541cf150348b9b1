"""What a checkpoint says of the run that wrote it, and a sentence where it cannot be read."""

import argparse
import contextlib
import logging
import warnings
from collections.abc import Iterator

from torch.distributed.checkpoint.api import CheckpointException

from megatron_espo.checkpoint.tracker import checkpoint_folder, has_checkpoint
from megatron_espo.errors import UserError


def checkpoint_arguments(path: str) -> argparse.Namespace | None:
    """Read the arguments stored in the latest torch_dist checkpoint of a folder.

    Args:
        path: a --save folder.

    Returns:
        The arguments, or None where there is no checkpoint.

    Raises:
        UserError: if the checkpoint cannot be read.
    """
    return stored_arguments(checkpoint_folder(path)) if has_checkpoint(path) else None


def stored_arguments(folder: str) -> argparse.Namespace:
    """Read the arguments stored in a torch_dist checkpoint.

    Args:
        folder: the folder of one iteration.

    Returns:
        The arguments.

    Raises:
        UserError: if the checkpoint cannot be read.
    """
    from megatron.core.dist_checkpointing import load_common_state_dict

    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # PyTorch logs the traceback of what is said here
    try:
        with warnings.catch_warnings(action="ignore"):  # that this is one process
            stored: argparse.Namespace = load_common_state_dict(folder)["args"]
    # torch.distributed.checkpoint's own error is no Exception.
    except (Exception, CheckpointException) as error:
        raise UserError(f"{folder}: cannot read this checkpoint ({_reason(error)}).") from error
    finally:
        logging.disable(disabled)
    return stored


@contextlib.contextmanager
def reading_checkpoint(path: str | None) -> Iterator[None]:
    """Say in a sentence that weights cannot be read.

    Args:
        path: the folder they are read from.

    Raises:
        UserError: PyTorch failed to read the files of a checkpoint.
    """
    try:
        yield
    except CheckpointException as error:
        raise UserError(f"{path}: cannot read this checkpoint ({_reason(error)}).") from error


def _reason(error: BaseException) -> str:
    """Say in one line why a checkpoint could not be read."""
    if isinstance(error, CheckpointException):
        error = next((failure for failure, _ in error.failures.values()), error)
    return next(iter(str(error).splitlines()), type(error).__name__)
