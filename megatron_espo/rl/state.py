"""What a checkpoint of an ESPO run holds beside Megatron's part, and when a run stops.

``SAVE/iter_0000012/`` is Megatron's torch_dist checkpoint of the policy and the optimizer;
``SAVE/iter_0000012/espo/`` holds the run's position, the rollout in hand, and the reference policy.
Both are whole before Megatron's tracker file names the iteration, so a checkpoint that was
interrupted is never the latest one.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.training import get_args, get_signal_handler
from megatron.training.checkpointing import save_checkpoint
from torch import Tensor

from megatron_espo.checkpoint.retention import Keeper
from megatron_espo.checkpoint.tracker import espo_folder, reference_folder
from megatron_espo.data.atomic_folder import full_disk_named
from megatron_espo.device import current_device
from megatron_espo.errors import UserError
from megatron_espo.parallel.layout import Layout, any_over_samples
from megatron_espo.rl.provenance import Settings
from megatron_espo.rl.reference import Reference
from megatron_espo.rl.run import RunState
from megatron_espo.startup.setup import inference_mode

ESPO, DPO = "an ESPO run", "a run of preference optimization"
"""What a run is, as its checkpoints say."""


class Checkpoints:
    """Saves a run: ESPO's state and the reference policy first, then Megatron's checkpoint."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        optimizer: Any,
        scheduler: Any,
        reference: Reference | None,
        made_with: Settings,
        writer: Any,
        keeper: Keeper | None = None,
        kind: str = ESPO,
    ) -> None:
        """Remember the parts.

        Args:
            chunks: this rank's model chunks.
            optimizer: Megatron's optimizer.
            scheduler: Megatron's scheduler.
            reference: the reference policy, or None.
            made_with: what a rollout in hand depends on.
            writer: TensorBoard writer or None.
            keeper: decides which checkpoints stay; None keeps all.
            kind: of the run.
        """
        self._parts = (list(chunks), optimizer, scheduler)
        self._reference, self._made_with, self._writer = reference, made_with, writer
        self._keeper, self._saved, self._kind = keeper, get_args().iteration, kind

    def is_due(self, step: int) -> bool:
        """Whether --save-interval has passed, the run is at its end, or better than ever."""
        args = get_args()
        if args.save is None:
            return False
        passed = step // args.save_interval > self._saved // args.save_interval
        best = self._keeper is not None and self._keeper.is_best(step)
        return passed or best or step == args.train_iters

    def evaluated(self, step: int, accuracy: float) -> None:
        """Take the held-out accuracy of a step, before it is saved or after.

        Args:
            step: optimizer steps done.
            accuracy: the same on every rank.
        """
        if self._keeper is None or step == 0:
            return
        self._keeper.evaluated(step, accuracy)
        if step == self._saved:
            self._keeper.saved(step, dist.get_rank() == 0)

    def save(self, position: RunState) -> None:
        """Write a checkpoint, on all ranks together; nothing without --save.

        One that is there already (saved or loaded at this step) is not written again: a kill
        meanwhile would break the last good checkpoint.

        Args:
            position: where the run is.
        """
        args = get_args()
        if args.save is None or position.step == self._saved:
            return
        if self._writer is not None:
            # What the checkpoint has seen must not be lost with a process that is killed.
            with full_disk_named(f"--tensorboard-dir {args.tensorboard_dir}"):
                self._writer.flush()
        with full_disk_named(f"--save {args.save}"):
            self._write(position)
        self._saved = position.step
        if self._keeper is not None:
            self._keeper.saved(position.step, dist.get_rank() == 0)

    def _write(self, position: RunState) -> None:
        args = get_args()
        step = position.step
        args.iteration = step
        args.consumed_train_samples = step * args.global_batch_size
        folder = espo_folder(args.save, step)
        if dist.get_rank() == 0:
            os.makedirs(folder, exist_ok=True)
            state = {
                "kind": self._kind,
                "evaluation_due": position.evaluation_due,
                "rollout": position.rollout,
                "watch": position.watch,
                "made_with": self._made_with,
                "accuracy": None if self._keeper is None else self._keeper.accuracy(step),
            }
            torch.save(state, os.path.join(folder, "state.pt"))
        # With overlapped parameter gathers, this rank holds the others' shards only in here.
        with inference_mode(self._parts[0], self._parts[1]):
            if self._reference is not None:
                self._reference.save(reference_folder(args.save, step))
            save_checkpoint(step, *self._parts, 0)


def read_state(root: str, step: int, kind: str = ESPO) -> dict[str, Any]:
    """Read ESPO's part of a checkpoint, apart from the reference policy.

    Args:
        root: the --load folder.
        step: the iteration.
        kind: of the run that goes on.

    Returns:
        What :meth:`Checkpoints.save` wrote.

    Raises:
        UserError: The checkpoint is not of such a run.
    """
    path = os.path.join(espo_folder(root, step), "state.pt")
    other = UserError(
        f"--load {root}: iteration {step} was not written by {kind}; pass that folder "
        "with --pretrained-checkpoint and another one with --load and --save."
    )
    if not os.path.isfile(path):
        raise other
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    # Whatever PyTorch raises of a file that was cut short means the same to the user.
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read; go on from an older checkpoint with --ckpt-step, or restore "
            "the file."
        ) from error
    # A checkpoint from before there was another kind names none.
    if state.get("kind", ESPO) != kind:
        raise other
    return state


def load_run_state(
    root: str | None, step: int, state: Mapping[str, Any] | None, reference: Reference | None
) -> RunState:
    """Take up ESPO's part of the checkpoint that Megatron has just loaded.

    Args:
        root: the --load folder.
        step: the iteration that was loaded; 0 for a run that starts.
        state: what :func:`read_state` has read of it.
        reference: takes the saved reference policy's weights, or None.

    Returns:
        Where the run goes on.

    Raises:
        UserError: The checkpoint has no reference policy.
    """
    if step == 0 or root is None:
        return RunState(0)
    assert state is not None
    if reference is not None:
        reference.load(reference_folder(root, step))
    return RunState(
        step,
        state["rollout"],
        state["evaluation_due"],
        state.get("watch"),
        state.get("accuracy"),
    )


class StopRequest:
    """Whether the run was told to end: SIGTERM, --exit-interval, --exit-duration-in-mins."""

    def __init__(self, layout: Layout) -> None:
        """Start the clock.

        Args:
            layout: process groups.
        """
        self._layout = layout
        self._started = time.monotonic()

    def agreed(self, step: int | None) -> bool:
        """Ask all ranks together.

        Args:
            step: optimizer steps done, or None between steps.

        Returns:
            True if any rank was told to end.
        """
        args = get_args()
        over = bool(
            args.exit_duration_in_mins
            and time.monotonic() - self._started > 60 * args.exit_duration_in_mins
        )
        if step is not None and args.exit_interval and step % args.exit_interval == 0:
            over = True
        votes: Tensor = torch.full((1,), int(_signalled() or over), device=current_device())
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def interrupted(self) -> bool:
        """Ask the ranks that work on the same samples together whether a signal came."""
        return any_over_samples(_signalled(), self._layout, current_device())


def _signalled() -> bool:
    return get_args().exit_signal_handler and bool(get_signal_handler()._signal_received)
