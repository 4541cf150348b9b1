"""Recomputation and random states."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import checkpoint as torch_checkpoint


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool,
    get_rng_state_tracker: Any,
    tp_group: Any,
    **kwargs: Any,
) -> Any:
    """As in the real one, the recomputation runs in the FP8 context of the first pass."""
    from transformer_engine.pytorch.quantization import fp8_autocast, state

    enabled, recipe = state.enabled, state.recipe

    def run(*inputs: Any) -> Any:
        with fp8_autocast(enabled=enabled, fp8_recipe=recipe):
            return function(*inputs, **kwargs)

    return torch_checkpoint.checkpoint(run, *args, use_reentrant=False)


@contextlib.contextmanager
def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> Iterator[None]:
    """Tells delayed scaling which of two forward passes this is."""
    yield


def is_fp8_activation_recompute_enabled() -> bool:
    return False


class CudaRNGStatesTracker:
    pass
