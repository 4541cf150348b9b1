"""The rotation of queries and keys agrees with Megatron's, forward and backward."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor

from megatron_espo.model.cpu import rotary

W, B, HEADS, D = 9, 2, 3, 8


def angles_of(per_row: bool) -> Tensor:
    """Megatron's table of some positions, ``[w, 1 or b, 1, d]``: both halves are the same."""
    half = torch.rand(W, B if per_row else 1, 1, D // 2, generator=torch.Generator().manual_seed(2))
    return torch.cat((half, half), -1) * 60


def parts_of(dtype: torch.dtype) -> Tensor:
    """Queries as a projection gives them: a slice of a larger tensor."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(W, B, HEADS, 3 * D, generator=generator, dtype=dtype)[..., D : 2 * D]


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-2)]
)
def test_rotation_and_its_gradient(per_row: bool, dtype: torch.dtype, tolerance: float) -> None:
    angles = angles_of(per_row).to(dtype if dtype == torch.float64 else torch.float32)
    ours, theirs = (parts_of(dtype).clone().requires_grad_() for _ in range(2))
    rotated = rotary.rotate(ours, *rotary._waves(angles, dtype))
    expected = _apply_rotary_pos_emb_bshd(theirs, angles)
    upstream = parts_of(dtype).flip(0)
    rotated.backward(upstream)
    expected.backward(upstream)
    assert rotated.dtype == dtype and ours.grad is not None and theirs.grad is not None
    assert (rotated - expected).abs().max() < tolerance
    assert (ours.grad - theirs.grad).abs().max() < tolerance


def test_rotation_is_the_same_with_and_without_gradients() -> None:
    """Old and new ELBOs of unchanged weights are equal to the bit: the ratio starts at 1."""
    parts, waves = parts_of(torch.float32), rotary._waves(angles_of(True), torch.float32)
    with torch.no_grad():
        plain = rotary.rotate(parts, *waves)
    assert torch.equal(plain, rotary.rotate(parts.clone().requires_grad_(), *waves))


def test_waves_are_taken_once_for_each_table_and_type() -> None:
    first, second = angles_of(False), angles_of(True)
    waves = rotary._waves(first, torch.float32)
    assert rotary._waves(first, torch.float32) is waves
    assert rotary._waves(first, torch.bfloat16)[0].dtype == torch.bfloat16
    assert rotary._waves(second, torch.float32)[0].shape == (W, B, 1, D)
