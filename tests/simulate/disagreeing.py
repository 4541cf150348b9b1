"""ESPO whose ranks would wait for each other for ever: they ask the wrong ones whether to stop.

The ranks of one copy of the model must ask each other during a rollout; here they ask all ranks,
and other copies make other numbers of steps.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_espo.rl.state import StopRequest
from megatron_espo.training import espo


def _asks_everyone(self: StopRequest) -> bool:
    vote = torch.zeros(1, dtype=torch.int64, device="cuda")
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return False


def main(argv: Sequence[str]) -> None:
    """Run ESPO with the mistake."""
    StopRequest.interrupted = _asks_everyone  # type: ignore[method-assign]
    espo.main(argv)
