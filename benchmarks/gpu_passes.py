"""Timed passes of the GPU benchmark: ELBOs, their gradients, denoising steps, matrix products."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from megatron.training import get_args
from torch import Tensor

from benchmarks.gpu_model import half_of_the_layers, layers_of
from megatron_espo import device
from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.diffusion.noise import ElboViews, elbo_views
from megatron_espo.generation.sampler import Interrupted, generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.monitor.flops import ModelDimensions, forward_flops
from megatron_espo.objectives import views_per_completion
from megatron_espo.passes.batch import ViewBatch, pack_sequences, view_batches
from megatron_espo.random import stream, uniform
from megatron_espo.rl.elbo import elbo_of_views
from megatron_espo.rl.update import accumulate_gradient

# ESPO's settings: one coupled draw, without old and reference policies.
ESPO = EspoConfig(num_mc=1, kl_coef=0.0, gradient="joint")


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        what: the pass.
        precision: bf16, float32 or an FP8 recipe.
        rows: rows of a micro-batch.
        seconds: of the pass with the layers that were built, the median.
        tflops: TFLOP/s of that.
        extrapolated_seconds: for all layers of the preset.
        extrapolated_tflops: TFLOP/s of that.
        peak_gib: most memory allocated during the pass, weights and gradient buffers included.
        tokens_per_second: of a rollout, extrapolated.
    """

    what: str
    precision: str
    rows: int
    seconds: float
    tflops: float
    extrapolated_seconds: float
    extrapolated_tflops: float
    peak_gib: float | None
    tokens_per_second: float | None = None


def views_of(
    model: DiffusionModel, rows: int, options: argparse.Namespace
) -> tuple[ElboViews, list[ViewBatch]]:
    """One micro-batch of views of random sequences."""
    n = max(rows // views_per_completion(ESPO), 1)
    ids = torch.arange(n)
    length = options.completion
    numbers = uniform(stream(1, "tokens"), ids, options.prompt + length)
    tokens = (numbers * min(model.vocab_size, model.mask_token_id)).long()
    views = elbo_views("coupled", stream(2, "elbo"), ids, ids, n, length, ESPO.num_mc)
    sequences = pack_sequences(
        tokens[:, : options.prompt].tolist(),
        tokens[:, options.prompt :],
        model.pad_token_id,
        model.shapes,
    )
    size = n * views_per_completion(ESPO)
    batches = view_batches(sequences, views, model.mask_token_id, model.vocab_size, size)
    return views, batches


def elbo_passes(
    model: DiffusionModel,
    precision: str,
    rows: int,
    all_layers: int,
    options: argparse.Namespace,
) -> list[Row]:
    """Measure an ELBO without and with its gradient."""
    views, batches = views_of(model, rows, options)
    n = views.weights.size(0)
    size, width = batches[0].batch.tokens.shape
    head_rows = batches[0].batch.rows.numel()
    advantages = torch.linspace(-1.0, 1.0, n)

    def forward() -> None:
        elbo_of_views(model, batches, views)

    def forward_backward() -> None:
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        length = options.completion
        accumulate_gradient(model, batches, views, None, None, advantages, length, ESPO, n)

    result = []
    for what, run, passes, training in (
        ("ELBO", forward, 1, False),
        ("ELBO + gradient", forward_backward, 3, True),
    ):
        for chunk in model.chunks:
            chunk.train(training)

        def flops(layers: int, passes: int = passes) -> float:
            shape = replace(ModelDimensions.from_args(get_args()), num_layers=layers)
            return passes * forward_flops(shape, size, width, head_rows)

        result.append(measure(what, precision, size, model, run, flops, all_layers, options))
    return result


def rollout_pass(
    model: DiffusionModel,
    precision: str,
    rows: int,
    all_layers: int,
    options: argparse.Namespace,
) -> Row:
    """Measure denoising steps: the first ones, whose blocks hold the most masks."""
    config = RolloutConfig(
        options.completion,
        options.block,
        options.steps,
        temperature=1.0,
        micro_batch_size=rows,
    )
    config.validate(model.logit_shift)
    ids = torch.arange(rows)
    prompts = (uniform(stream(3, "prompts"), ids, options.prompt) * 250).long().tolist()
    timed = min(options.timed_steps, options.steps)
    width = -(-(options.prompt + options.completion) // model.pad_multiple) * model.pad_multiple
    for chunk in model.chunks:
        chunk.eval()

    def run() -> None:
        steps = 0

        def stop(_: Tensor) -> None:
            nonlocal steps
            steps += 1
            if steps == timed:
                raise Interrupted

        try:
            generate(model, prompts, ids, config, 0, "benchmark", stop)
        except Interrupted:
            return

    def flops(layers: int) -> float:
        shape = replace(ModelDimensions.from_args(get_args()), num_layers=layers)
        return float(timed) * forward_flops(shape, rows, width, rows * options.block)

    row = measure("rollout", precision, rows, model, run, flops, all_layers, options)
    whole = row.extrapolated_seconds / timed * options.steps
    return replace(row, tokens_per_second=rows * options.completion / whole)


def measure(
    what: str,
    precision: str,
    rows: int,
    model: DiffusionModel,
    run: Callable[[], None],
    flops: Callable[[int], float],
    all_layers: int,
    options: argparse.Namespace,
) -> Row:
    """Time a pass with all layers and with half of them, in turns.

    Args:
        what: the pass.
        precision: name.
        rows: rows of its micro-batch.
        model: the model.
        run: makes the pass.
        flops: its operations for a number of layers.
        all_layers: layers to extrapolate to.
        options: repeats.

    Returns:
        The measurement.
    """
    built = len(layers_of(model))
    whole, half = [], []
    run()  # allocates, compiles, picks kernels
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(options.repeats):
        whole.append(seconds_of(run))
        with half_of_the_layers(model):
            half.append(seconds_of(run))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.has_cuda() else None
    seconds = sorted(whole)[len(whole) // 2]
    per_layer = max(seconds - sorted(half)[len(half) // 2], 0.0) / (built - built // 2)
    extrapolated = seconds + (all_layers - built) * per_layer
    return Row(
        what,
        precision,
        rows,
        seconds,
        flops(built) / seconds / 1e12,
        extrapolated,
        flops(all_layers) / extrapolated / 1e12,
        peak,
    )


def seconds_of(run: Callable[[], None]) -> float:
    """Time one call."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_ceiling(
    precision: str, model: DiffusionModel, options: argparse.Namespace
) -> float | None:
    """Measure plain matrix products of a layer's shapes: TFLOP/s, or None where they do not run.

    The tokens are those of the largest ELBO pass; FP8 with one scale per tensor.
    """
    args, tokens = get_args(), max(options.rows) * (options.prompt + options.completion)
    tokens = -(-tokens // 16) * 16
    heads = args.num_attention_heads * args.kv_channels
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    shapes = [  # inputs and outputs of the linear layers
        (args.hidden_size, heads + 2 * groups * args.kv_channels),
        (heads, args.hidden_size),
        (args.hidden_size, 2 * args.ffn_hidden_size),
        (args.ffn_hidden_size, args.hidden_size),
    ]
    products = []
    for inputs, outputs in shapes:
        a = torch.randn(tokens, inputs, device=model.device, dtype=torch.bfloat16)
        b = torch.randn(outputs, inputs, device=model.device, dtype=torch.bfloat16)
        if precision == "float8":
            if not device.has_cuda() or torch.cuda.get_device_capability() < (8, 9):
                return None
            a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        products.append((a, b.t()))
    one = torch.ones((), device=model.device)

    def run() -> None:
        for a, b in products:
            if precision == "float8":
                torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
            else:
                torch.mm(a, b)

    run()
    times = sorted(seconds_of(run) for _ in range(options.repeats))
    flops: float = sum(2.0 * tokens * inputs * outputs for inputs, outputs in shapes)
    return flops / times[len(times) // 2] / 1e12
