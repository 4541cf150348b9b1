"""The FP8 context, and rounding to FP8."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformer_engine.common.recipe import DelayedScaling, MXFP8BlockScaling, Recipe
from transformer_engine.signatures import bound

LARGEST = 448.0  # of E4M3, which forward passes use in both formats


@dataclass
class State:
    enabled: bool = False
    recipe: Recipe | None = None


state = State()
# One entry per pass through a linear layer or an attention core: (class, recipe or None).
calls: list[tuple[str, str | None]] = []


def record(module: object) -> None:
    calls.append((type(module).__name__, type(state.recipe).__name__ if state.enabled else None))


@contextlib.contextmanager
def fp8_autocast(*args: Any, **kwargs: Any) -> Iterator[None]:
    given = bound("fp8_autocast", *args, **kwargs)
    before = (state.enabled, state.recipe)
    state.enabled, state.recipe = given.get("enabled", True), given.get("fp8_recipe")
    try:
        yield
    finally:
        state.enabled, state.recipe = before


@contextlib.contextmanager
def fp8_model_init(*args: Any, **kwargs: Any) -> Iterator[None]:
    if bound("fp8_model_init", *args, **kwargs).get("enabled", True):
        raise NotImplementedError("the stand-in stores no weights in FP8")
    yield


class FP8GlobalStateManager:
    """Asked what the device can do."""

    answer = (True, "")

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return state.enabled

    @classmethod
    def is_fp8_available(cls) -> tuple[bool, str]:
        return cls.answer

    @classmethod
    def is_mxfp8_available(cls) -> tuple[bool, str]:
        return cls.answer

    @classmethod
    def is_fp8_block_scaling_available(cls) -> tuple[bool, str]:
        return cls.answer


def alignment(with_gradient: bool) -> int:
    """What the number of tokens must be a multiple of in the current context."""
    if isinstance(state.recipe, MXFP8BlockScaling):
        return 32
    # The leading dimension of the weight gradient's product is the number of tokens.
    return 16 if with_gradient else 8


def check_shape(tensor: Tensor, with_gradient: bool) -> None:
    tokens, needed = tensor.shape[:-1].numel(), alignment(with_gradient)
    if tokens % needed or tensor.size(-1) % max(needed, 16):
        raise ValueError(f"FP8 execution: {list(tensor.shape)} is not a multiple of {needed}")


def rounded(values: Tensor, block: tuple[int, int], history: list[float]) -> Tensor:
    """Round to E4M3 under the current recipe.

    Args:
        values: ``[..., k]``.
        block: rows and columns that share a scale under the blockwise recipe.
        history: largest entries seen before, for delayed scaling; grows.
    """
    flat = values.detach().float().flatten(0, -2)
    if isinstance(state.recipe, DelayedScaling):
        largest = torch.tensor(max(history[-16:], default=1.0))
        history.append(float(flat.abs().max()))
        scale = LARGEST / largest.clamp(min=1e-12)
        return round_values(flat, scale).view_as(values).to(values.dtype)
    name = type(state.recipe).__name__
    rows, columns = {
        "Float8CurrentScaling": tuple(flat.shape),
        "Float8BlockScaling": block,
        "MXFP8BlockScaling": (1, 32),
    }[name]
    pad = (-flat.size(0) % rows, -flat.size(1) % columns)
    padded = torch.nn.functional.pad(flat, (0, pad[1], 0, pad[0]))
    tiles = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    scale = LARGEST / tiles.abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-12)
    if name != "Float8CurrentScaling":
        scale = scale.log2().floor().exp2()
    result = round_values(tiles, scale).flatten(2, 3).flatten(0, 1)
    return result[: flat.size(0), : flat.size(1)].reshape(values.shape).to(values.dtype)


def round_values(values: Tensor, scale: Tensor) -> Tensor:
    scaled = (values * scale).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).float() / scale


class _Replace(torch.autograd.Function):
    """Takes the second argument's values and the first one's gradient."""

    @staticmethod
    def forward(context: Any, original: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def replace(original: Tensor, values: Tensor) -> Tensor:
    return _Replace.apply(original, values)
