"""Compares the logits of a checkpoint with those of a Hugging Face folder."""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from tqdm import tqdm

from megatron_espo.adapters.attach import whole_state
from megatron_espo.conversion.hf_oracle import HfOracle
from megatron_espo.conversion.hugging_face import HuggingFaceWeights
from megatron_espo.conversion.layerwise import stream_weights
from megatron_espo.conversion.mixture_oracle import MixtureOracle
from megatron_espo.conversion.torch_dist import CheckpointReader
from megatron_espo.device import current_device
from megatron_espo.errors import UserError
from megatron_espo.model.provider import model_provider
from megatron_espo.model.shape import ModelShape
from megatron_espo.passes.pipeline import RowBatch, run_model

# Largest difference in float32, as a share of the largest logit: rounding in another order.
TOLERANCE = 1e-4

_ROWS, _WIDTH = 3, 32


def verify(
    checkpoints: Sequence[CheckpointReader],
    weights: HuggingFaceWeights,
    fields: Mapping[str, Any],
    shape: ModelShape,
) -> None:
    """Compare the logits of both sides on random tokens, some of them masked, a row padded.

    One side is Megatron's model, with the blocks of the checkpoint that it asks for itself, the
    other transformers' own model (conversion/hf_oracle.py), or one in plain PyTorch where that has
    none (conversion/mixture_oracle.py). Both compute in float32 and hold one
    layer at a time.

    Args:
        checkpoints: that of the model which Megatron's global arguments describe, in float32, or
            those of its adapters and of their base.
        weights: the Hugging Face side.
        fields: what is known of that side, its config.json among it.
        shape: what the converter made of it.

    Raises:
        UserError: they differ by more than rounding does.
    """
    # On a GPU TF32 is far from the tolerance, and NVIDIA's images turn it on.
    torch.set_float32_matmul_precision("highest")
    tokens, lengths = _random_tokens(fields["vocab_size"], shape.mask_token_id)
    ours = _checkpoint_logits(checkpoints, tokens, lengths, shape.logit_shift)
    if "num_experts" in fields:
        theirs = MixtureOracle(fields, weights.read, torch.float32).logits(tokens, lengths)
    else:
        theirs = HfOracle(fields, weights, torch.float32).logits(tokens, lengths)
    # The first position of a shifted model has no prediction.
    compared = torch.arange(_WIDTH)[None, :] < lengths[:, None]
    compared[:, 0] = False
    _judge(ours[compared], theirs[compared])


def _random_tokens(vocab_size: int, mask_token_id: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (_ROWS, _WIDTH), generator=generator)
    masked = torch.rand(_ROWS, _WIDTH, generator=generator) < torch.arange(_ROWS)[:, None] / _ROWS
    tokens[masked] = mask_token_id
    return tokens, torch.tensor([_WIDTH, _WIDTH, _WIDTH // 2])


@torch.no_grad()
def _checkpoint_logits(
    checkpoints: Sequence[CheckpointReader], tokens: Tensor, lengths: Tensor, logit_shift: bool
) -> Tensor:
    """Compute float32 ``[b, s, vocabulary]`` with Megatron's model."""
    home = {key: reader for reader in checkpoints for key in reader.weights()}
    with quiet(), torch.device("meta"):
        model = model_provider().float().eval()
        sharded = whole_state(model)

    def read(target: ShardedTensor | ShardedTensorFactory) -> Tensor:
        if isinstance(target, ShardedTensorFactory):  # gate and up are stored one by one
            merged: Tensor = target.merge_fn([read(part) for part in target.build()])
            return merged
        shape = (1,) * target.prepend_axis_num + target.local_shape
        block = home[target.key].read(target.key, target.global_offset, shape)
        return block.view(target.local_shape).float()

    def read_part(names: Sequence[str]) -> dict[str, Tensor]:
        bar.update(1)
        # Megatron's model computes on a GPU where there is one.
        return {name: read(sharded[name]).to(current_device()) for name in names}

    layers = len(model.decoder.layers)
    with tqdm(desc="verify: layers of Megatron's model", total=layers + 3) as bar:
        stream_weights(
            model,
            ["embedding", "decoder.layers.*", "decoder.final_layernorm", "output_layer"],
            read_part,
            # The output head has its weights where they are tied.
            kept=["embedding"] if model.share_embeddings_and_output_weights else [],
        )
        b, s = tokens.shape
        first = int(logit_shift)
        rows = torch.arange(b).repeat_interleave(s - first)
        positions = torch.arange(first, s).repeat(b)
        batch = RowBatch(tokens, lengths, rows, positions)
        chosen = run_model(model, batch, lambda logits, _: logits, logit_shift)
    logits = torch.zeros(b, s, chosen.size(1))
    logits[rows, positions] = chosen.cpu()
    return logits


def _judge(ours: Tensor, theirs: Tensor) -> None:
    """Print the differences of ``[r, vocabulary]`` logits and refuse large ones."""
    difference = (ours - theirs).abs().max().item()
    largest = theirs.abs().max().item()
    agree = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    print(
        f"verify: largest difference {difference:.2e} of logits up to {largest:.3g}, equal argmax "
        f"at {agree:.2%} of {len(ours)} positions."
    )
    # Written so that a NaN fails.
    if not difference <= TOLERANCE * max(largest, 1.0):
        raise UserError(
            "--verify: the logits of both sides differ by more than rounding; nothing was kept."
        )


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
