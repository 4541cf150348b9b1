"""Compares the logits of a checkpoint with those of a Hugging Face folder."""

import contextlib
import gc
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_espo.checkpoint.hugging_face import HuggingFaceWeights, read_json
from megatron_espo.checkpoint.twin import Twin
from megatron_espo.parallel.pipeline import RowBatch, forward_only
from megatron_espo.training.inference import load_model

# Largest difference in float32, as a share of the largest logit: rounding in another order.
TOLERANCE = 1e-4
# Smallest cosine of a position's logits in 16 bits.
COSINE = 0.999

_ROWS, _WIDTH = 3, 32
# Megatron's loader holds a second copy of the gate and up projections for a while.
_COPIES = 1.45


def verify(
    megatron: str, iteration: int | None, weights: HuggingFaceWeights, dtype: torch.dtype
) -> None:
    """Compare the logits of both sides on random tokens, some of them masked, some rows padded.

    The checkpoint is loaded the way training loads it. The other side is transformers' own model
    (see checkpoint/twin.py). One model is in memory at a time.

    Args:
        megatron: a --save folder.
        iteration: which checkpoint; None takes the latest.
        weights: the Hugging Face side.
        dtype: type to compute in.

    Raises:
        ValueError: they differ by more than rounding does, or there is too little memory.
    """
    _check_memory(weights, dtype)
    fields = read_json(weights.folder / "config.json")
    tokens, lengths = _random_tokens(fields["vocab_size"], fields["mask_token_id"])
    ours = _checkpoint_logits(megatron, iteration, tokens, lengths, dtype)
    gc.collect()
    theirs = Twin(fields, weights, dtype).logits(tokens, lengths)
    # The first position of a shifted model has no prediction.
    compared = torch.arange(_WIDTH)[None, :] < lengths[:, None]
    compared[:, 0] = False
    _judge(ours[compared], theirs[compared], dtype)


def _random_tokens(vocab_size: int, mask_token_id: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (_ROWS, _WIDTH), generator=generator)
    masked = torch.rand(_ROWS, _WIDTH, generator=generator) < torch.arange(_ROWS)[:, None] / _ROWS
    tokens[masked] = mask_token_id
    return tokens, torch.tensor([_WIDTH, _WIDTH, _WIDTH // 2])


def _checkpoint_logits(
    megatron: str, iteration: int | None, tokens: Tensor, lengths: Tensor, dtype: torch.dtype
) -> Tensor:
    """Compute float32 ``[b, s, vocabulary]`` with the model that --load gives."""
    step = [] if iteration is None else ["--ckpt-step", str(iteration)]
    # Rollout settings play no part, but must fit each other.
    with quiet():
        model, _ = load_model(["--load", megatron, *step], dtype)
    b, s = tokens.shape
    first = int(model.logit_shift)
    rows = torch.arange(b).repeat_interleave(s - first)
    positions = torch.arange(first, s).repeat(b)
    batch = RowBatch(tokens, lengths, rows, positions).to(model.device)
    (chosen,) = forward_only(
        model.chunks, [batch], lambda logits, _: logits, model.logit_shift, model.layout
    )
    logits = torch.zeros(b, s, model.vocab_size)
    logits[rows, positions] = chosen[:, : model.vocab_size].float().cpu()
    return logits


def _judge(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Print the differences of ``[r, vocabulary]`` logits and refuse large ones."""
    difference = (ours - theirs).abs().max().item()
    largest = theirs.abs().max().item()
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min().item()
    agree = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    print(
        f"verify ({str(dtype).removeprefix('torch.')}): largest difference {difference:.2e} of "
        f"logits up to {largest:.3g}, smallest cosine {cosine:.6f}, equal argmax {agree:.2%} of "
        f"{len(ours)} positions."
    )
    exact = dtype == torch.float32
    # Written so that a NaN fails.
    if not (difference <= TOLERANCE * max(largest, 1.0) if exact else cosine >= COSINE):
        raise ValueError(
            "--verify: the logits of both sides differ by more than rounding; nothing was kept."
        )


def _check_memory(weights: HuggingFaceWeights, dtype: torch.dtype) -> None:
    """Refuse before the system ends the process."""
    sizes = (torch.Size(stored.shape).numel() for stored in weights.tensors.values())
    needed = _COPIES * sum(sizes) * dtype.itemsize
    free = _available_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"--verify needs {needed / 1e9:.3g} GB of memory and {free / 1e9:.3g} GB are free; "
            "use --verify-dtype bfloat16 or leave it out."
        )


def _available_memory() -> int | None:
    """Bytes that processes can still get; None where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Megatron prints when it starts; errors come through as exceptions."""
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(logging.NOTSET)
