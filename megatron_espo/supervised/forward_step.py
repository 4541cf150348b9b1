"""The forward step of pre-training and fine-tuning: noise a batch, predict what it hides."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from megatron.training import get_args, get_timers
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from torch import Tensor
from torch.nn.functional import pad

from megatron_espo.config import DiffusionConfig
from megatron_espo.diffusion.block_noise import BlockNoise
from megatron_espo.diffusion.noise import Noise, bernoulli, exact_count, random_lengths
from megatron_espo.diffusion.token_loss import weighted_token_loss
from megatron_espo.model.head import masked_cross_entropy
from megatron_espo.parallel.layout import current_layout
from megatron_espo.passes.batch import mask_rows
from megatron_espo.passes.block_mask import block_attention
from megatron_espo.passes.pipeline import RowBatch, run_model
from megatron_espo.passes.shapes import Shapes
from megatron_espo.random import Stream, stream, substream
from megatron_espo.startup.arguments import config_from_args
from megatron_espo.supervised.blocks import grow_blocks, noise_blocks
from megatron_espo.transfer import on_device

Report = dict[str, Tensor]
LossFunction = Callable[[Tensor], tuple[Tensor, Report]]


def forward_step(
    iterator: Iterator[dict[str, Tensor]], model: Any, shapes: Shapes | None = None
) -> tuple[Tensor, LossFunction]:
    """Run one micro-batch (Megatron's forward-step interface).

    Args:
        iterator: yields batches of a PretrainDataset or an SftDataset.
        model: this rank's model chunk.
        shapes: widths that micro-batches of fine-tuning are cut to; None: those of their rows.

    Returns:
        The chunk's output and the loss as a function of it.
    """
    args, timers = get_args(), get_timers()
    grow_blocks(args)
    config = config_from_args(DiffusionConfig, args)
    timers("batch-generator", log_level=2).start()
    # Every rank holds the batch and draws the same noise for it: nothing is broadcast. Training
    # and validation samples may share ids, so they are told apart by the purpose.
    key = stream(args.seed, "train-noise" if model.training else "valid-noise")
    batch, noise, maskable = noise_batch(
        next(iterator), config, key, args.mask_token_id, args.vocab_size, shapes
    )
    timers("batch-generator").stop()
    if shapes is not None and model.training and (args.log_throughput or args.log_progress):
        _count_tokens(model, batch.lengths)
    layout = current_layout()
    output = run_model(model, batch, masked_cross_entropy(layout.tp), config.logit_shift)
    return output, partial(
        _loss,
        noise=noise,
        lengths=maskable.sum(dim=1),
        cp_size=layout.cp_size,
        next_tokens=config.next_token_weight > 0,
    )


def noise_batch(
    data: dict[str, Tensor],
    config: DiffusionConfig,
    key: Stream,
    mask_token_id: int,
    vocab_size: int,
    shapes: Shapes | None = None,
) -> tuple[RowBatch, Noise | BlockNoise, Tensor]:
    """Noise a batch of clean rows.

    Pre-training rows are maskable throughout, a share of them cut to a random length; fine-tuning
    rows are maskable in the completion, its end-of-sequence padding included. What a row's tokens
    are noised with does not depend on the width of the batch: a row of draws that is longer begins
    with the same ones.

    Args:
        data: ``tokens`` int64 ``[b, s]``, ``sample_id`` int64 ``[b]``, and for fine-tuning
            ``prompt_length`` and ``completion_length``, int64 ``[b]``.
        config: forward process.
        key: random stream.
        mask_token_id: takes the place of what is masked.
        vocab_size: tokens before padding.
        shapes: widths that fine-tuning rows are cut to, which leaves out padding alone; None
            leaves them as they are.

    Returns:
        The micro-batch, its noise, and the maskable positions, bool ``[b, w]``, w at most s.
    """
    tokens, ids = data["tokens"], data["sample_id"]
    b, s = tokens.shape
    if "prompt_length" in data:
        starts = data["prompt_length"]
        lengths = starts + data["completion_length"]
    else:
        lengths = random_lengths(
            substream(key, "length"), ids, torch.full((b,), s), config.random_length_probability
        )
        starts = torch.zeros(b, dtype=torch.int64)
    if config.logit_shift:
        # There is no hidden state before position 0 to predict it from. A sample cut to one
        # token would have nothing left to predict.
        starts, lengths = starts.clamp(min=1), lengths.clamp(min=2)
    if shapes is not None and "prompt_length" in data:
        tokens = tokens[:, : shapes.width(int(lengths.max()))]
    positions = torch.arange(tokens.size(1))[None]
    maskable = (positions >= starts[:, None]) & (positions < lengths[:, None])
    blocks = block_attention(config)
    if blocks is not None:
        whole = noise_blocks(
            tokens, ids, lengths, maskable, config, blocks, key, mask_token_id, vocab_size
        )
        return *whole, maskable
    noise_key = substream(key, config.forward_process)
    if config.forward_process == "bernoulli":
        noise = bernoulli(noise_key, ids, maskable, config.mask_epsilon)
    else:
        noise = exact_count(noise_key, ids, maskable)
    whole_rows = torch.zeros(b, dtype=torch.int64)
    batch = mask_rows(tokens, lengths, noise.mask_indices, whole_rows, mask_token_id, vocab_size)
    return batch, noise, maskable


def _count_tokens(model: Any, lengths: Tensor) -> None:
    """Let Megatron's count of operations go by what rows hold, not by --seq-length.

    Args:
        model: the model chunk; of several virtual stages the first one counts.
        lengths: int64 ``[b]``.
    """
    if not unwrap_model(model).vp_stage:
        update_seqlen_stats_from_cu_seqlens(pad(lengths.cumsum(0), (1, 0)))


def _loss(
    cross_entropy: Tensor,
    *,
    noise: Noise | BlockNoise,
    lengths: Tensor,
    cp_size: int,
    next_tokens: bool = False,
) -> tuple[Tensor, Report]:
    known = on_device((noise.weights, lengths), cross_entropy.device)
    # Of block diffusion a sequence has a row for its noisy copy and one for its clean tokens.
    table = cross_entropy.view(lengths.numel(), -1)
    loss = weighted_token_loss(table, *known)
    terms = {"lm loss": loss.detach()}
    if next_tokens:
        # What is learnt is a sum; only its terms can be held against those of another run.
        (noisy, clean), (weights, _) = (part.chunk(2, dim=1) for part in (table.detach(), known[0]))
        terms["diffusion loss"] = weighted_token_loss(noisy, weights, known[1])
        terms["next-token loss"] = (clean.sum(dim=1) / known[1]).mean()
    rows = torch.full((), float(lengths.numel()), device=cross_entropy.device)
    # Megatron multiplies the loss by the context-parallel size, for ranks that see a part of it
    # each; here they all see the whole. It divides the summed first entries of the report by the
    # summed second ones, over all ranks.
    report = {name: torch.stack((value * rows, rows)) for name, value in terms.items()}
    return loss / cp_size, report
