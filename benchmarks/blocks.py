"""Block diffusion: what the cache, the noisy copy and a shared clean half cost or save.

python -m benchmarks.blocks sampling --blocks 4 32       # with the exact cache and without
python -m benchmarks.blocks doubled --positions 256 1024 # [noisy, clean] against a plain pass
python -m benchmarks.blocks views --positions 256        # four views of a sequence, one clean half
python -m benchmarks.blocks prompts --completion 32      # a group's prompt passed once

Both sides of a comparison run in one process, in turn, from the same random float32 weights.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measure import MIB, interleaved, keep_freed_memory, peak_memory, ratios, spread
from benchmarks.models import SHAPES, Shape, build_random, random_prompts
from megatron_espo.config import RolloutConfig
from megatron_espo.conversion.verification import quiet
from megatron_espo.generation import block_steps
from megatron_espo.generation.rows import Rows
from megatron_espo.generation.sampler import generate
from megatron_espo.generation.scheduler import MicroBatch
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.model.head import view_cross_entropy
from megatron_espo.passes.batch import mask_rows, pack_sequences
from megatron_espo.passes.block_batch import block_rows
from megatron_espo.passes.block_mask import BlockAttention
from megatron_espo.passes.pipeline import RowBatch, run_model
from megatron_espo.random import stream
from megatron_espo.rl.elbo import cut_views, draw_views


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line names and print ratios.

    Args:
        argv: command line.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("sampling", "doubled", "views", "prompts"))
    parser.add_argument("--shape", choices=SHAPES, default="small-vocabulary")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4], help="tokens of a block")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=256)
    parser.add_argument("--positions", type=int, nargs="+", default=[256], help="of a row")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="also measure peaks, of sampling")
    options = parser.parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    with quiet():
        model = build_random(shape)
    for size in options.blocks:
        model = replace(model, blocks=BlockAttention(size, causal=False))
        if options.what in ("sampling", "prompts"):
            {"sampling": _sampling, "prompts": _prompts}[options.what](model, shape, size, options)
            continue
        for positions in options.positions:
            sides = {"doubled": _doubled, "views": _views}[options.what]
            _compare(sides(model, shape, positions, options.rows), options.pairs,
                     f"{options.what}, {positions} positions, blocks of {size}")  # fmt: skip


def _compare(sides: dict[str, Callable[[], Any]], pairs: int, title: str) -> dict[str, Any]:
    """Time two sides; the ratio is that of the first one to the second."""
    seconds, results = interleaved(sides, pairs)
    (first, slow), (second, fast) = seconds.items()
    print(f"{title}: {first} {spread(slow)} s, {second} {spread(fast)} s, ratio "
          f"{ratios(slow, fast)}", flush=True)  # fmt: skip
    return results


def _rollout(options: argparse.Namespace, size: int, cache: str) -> RolloutConfig:
    """One token a step, drawn, so that all is undecided as long as possible."""
    length = options.completion
    return RolloutConfig(length, size, length, cache=cache)  # type: ignore[arg-type]


def _sampling(model: DiffusionModel, shape: Shape, size: int, options: argparse.Namespace) -> None:
    for chunk in model.chunks:
        chunk.eval()
    prompts, ids = random_prompts(options.rows, options.prompt, shape), torch.arange(options.rows)
    sides: dict[str, Callable[[], Any]] = {
        name: partial(generate, model, prompts, ids, _rollout(options, size, cache), 1, "benchmark")
        for name, cache in (("without a cache", "none"), ("exact cache", "exact"))
    }
    title = f"sampling, prompt {options.prompt}, completion {options.completion}, blocks of {size}"
    results = _compare(sides, options.pairs, title)
    plain, cached = (result.completions for result in results.values())
    same = (plain == cached).double().mean().item()
    held = 2 * 4 * (options.prompt + options.completion) * shape.hidden_size * shape.num_layers
    print(f"  equal tokens {same:.4f}; cache {options.rows * held / MIB:.1f} MiB", flush=True)
    if options.memory:
        for name, cache in (("without a cache", "none"), ("exact cache", "exact")):
            peak = peak_memory(_prepared, shape, size, vars(options), cache)
            print(f"  {name}: peak {peak / MIB:.0f} MiB above the weights", flush=True)


GROUP = 8
"""Completions of a prompt."""


def _prompts(model: DiffusionModel, shape: Shape, size: int, options: argparse.Namespace) -> None:
    for chunk in model.chunks:
        chunk.eval()
    (prompt,), ids = random_prompts(1, options.prompt, shape), torch.arange(GROUP)
    config = replace(_rollout(options, size, "exact"), micro_batch_size=GROUP)
    work = partial(generate, model, [prompt] * GROUP, ids, config, 1, "benchmark")

    def apart() -> Any:
        # There is no switch for it: it costs nothing where no two rows begin alike.
        with patch.object(block_steps, "_prefixes", _each_its_own):
            return work()

    title = (
        f"prompt {options.prompt}, {GROUP} completions of {options.completion}, blocks of {size}"
    )
    results = _compare({"each its own prompt": apart, "once": work}, options.pairs, title)
    one, other = (result.completions for result in results.values())
    assert torch.equal(one, other), "tokens differ"
    positions = [float(result.work[:, 0].sum()) for result in results.values()]
    print(f"  equal tokens; positions passed allow {positions[0] / positions[1]:.2f}", flush=True)


def _each_its_own(rows: Rows, batch: MicroBatch) -> block_steps._Prefixes:
    return block_steps._Prefixes(torch.tensor(batch.rows), torch.arange(len(batch.rows)))


def _prepared(
    shape: Shape, size: int, options: dict[str, Any], cache: str
) -> Callable[[bool], Any]:
    """Build one side of the comparison of memory, in a process of its own."""
    with quiet():
        model = replace(build_random(shape), blocks=BlockAttention(size, causal=False))
    for chunk in model.chunks:
        chunk.eval()
    given = argparse.Namespace(**options)

    def work(small: bool) -> Any:
        own = argparse.Namespace(**{**options, "completion": size} if small else options)
        prompts = random_prompts(given.rows, size if small else given.prompt, shape)
        ids = torch.arange(given.rows)
        return generate(model, prompts, ids, _rollout(own, size, cache), 1, "benchmark")

    return work


def _trained(model: DiffusionModel, batches: Sequence[RowBatch]) -> Tensor:
    """Pass micro-batches forward and backward; their summed losses."""
    total = torch.zeros(())
    for chunk in model.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    for batch in batches:
        loss = run_model(model.chunks[0], batch, view_cross_entropy(model.layout.tp), False).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def _doubled(
    model: DiffusionModel, shape: Shape, positions: int, rows: int
) -> dict[str, Callable[[], Any]]:
    """Half of all tokens are masked, in both passes the same ones."""
    assert model.blocks is not None
    tokens = torch.tensor(random_prompts(rows, positions, shape))
    lengths, starts = torch.full((rows,), positions), torch.zeros(rows, dtype=torch.int64)
    mask = torch.rand(rows, positions, generator=torch.Generator().manual_seed(3)) < 0.5
    known = (lengths, mask, starts, model.mask_token_id, model.vocab_size)
    plain = mask_rows(tokens, *known)
    both = block_rows(
        tokens, lengths, mask[:, None], starts, *known[3:], model.blocks, logit_shift=False
    )
    return {
        "[noisy, clean]": partial(_trained, model, [both]),
        "plain": partial(_trained, model, [plain]),
    }


def _views(
    model: DiffusionModel, shape: Shape, positions: int, rows: int
) -> dict[str, Callable[[], Any]]:
    """Two coupled draws of each sequence, of which half is the completion."""
    length, ids = positions // 2, torch.arange(rows)
    completions = torch.tensor(random_prompts(rows, length, shape, seed=9))
    prompts = random_prompts(rows, positions - length, shape)
    sequences = pack_sequences(prompts, completions, model.pad_token_id, model.shapes)
    key = stream(1, "benchmark")
    views = draw_views(model, sequences, "coupled", key, ids, ids, rows, 2)

    def side(rows_per_batch: int) -> Callable[[], Any]:
        batches = [batch.batch for batch in cut_views(model, sequences, views, rows_per_batch)]
        return partial(_trained, model, batches)

    return {"shared clean half": side(4), "four passes": side(1)}


if __name__ == "__main__":
    main()
