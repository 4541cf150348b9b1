"""What rounding logits to bf16 does to ELBOs and to log-ratios between two policies.

A model with random weights and LLaDA's vocabulary, on the CPU. Its head is scaled so that the
logits spread as little or as much as wanted; the completions are its own. The second policy is the
first one after a step of Adam's size on all (float32) weights in random directions. Both are
evaluated under the same masks,

* in float32 throughout, with the weights rounded to bf16 (the exact values of what follows),
* in bf16 with float32 logits (model/float_logits.py),
* in bf16 with bf16 logits, Megatron's own head.

    python -m benchmarks.logit_rounding [--shape smoke] [--completions N] [--length N]

Prints root mean squares over completions, in nats per token.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from benchmarks.models import SHAPES, build_random, random_prompts
from megatron_espo.config import RolloutConfig
from megatron_espo.generation.sampler import generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.passes.pipeline import RowBatch, forward_only
from megatron_espo.rl.elbo import estimate_elbo

PROMPT = 16
SPREADS = (1.0, 2.0, 4.0)
STEP = 3e-6  # of ESPO's published runs


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="large-vocabulary")
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    shape, n, length = SHAPES[options.shape], options.completions, options.length
    with redirect_stdout(sys.stderr):
        wrapped = build_random(shape)
    print(f"{n} completions of {length} tokens, one coupled pair of masks each")
    print(
        "| spread of logits | ELBO, log-ratio | logits rounded | bf16, float32 logits "
        "| bf16, bf16 logits | log-ratio: logits rounded | bf16, float32 logits "
        "| bf16, bf16 logits |"
    )
    print("|---|---|---|---|---|---|---|---|")
    model = replace(wrapped, chunks=tuple(unwrap_model(list(wrapped.chunks))))
    for chunk in model.chunks:
        chunk.eval()
    prompts = random_prompts(n, PROMPT, shape)
    for spread in SPREADS:
        _scale_head(model, prompts, spread)
        rollout = RolloutConfig(length, length, 8, 1.0, micro_batch_size=4)
        tokens = generate(model, prompts, torch.arange(n), rollout, 1, "rounding").completions
        masters = [parameter.detach().clone() for parameter in model.chunks[0].parameters()]
        old = _elbos(model, masters, prompts, tokens)
        new = _elbos(model, _moved(masters, STEP), prompts, tokens)
        ratio = {kind: new[kind] - old[kind] for kind in old}
        cells = [f"{spread:g}", f"{old['exact'].mean():.2f}, {_rms(ratio['exact']):.1e}"]
        for found in (old, ratio):
            cells.append(f"{_rms(found['bf16 logits'] - found['float32 logits']):.1e}")
            for kind in ("float32 logits", "bf16 logits"):
                cells.append(f"{_rms(found[kind] - found['exact']):.1e}")
        print(f"| {' | '.join(cells)} |", flush=True)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


@torch.no_grad()
def _scale_head(model: DiffusionModel, prompts: Any, spread: float) -> None:
    """Scale the head so that the logits of a prompt have a standard deviation."""
    tokens = torch.tensor(prompts[:1])
    batch = RowBatch(
        tokens, torch.tensor([PROMPT]), torch.zeros(PROMPT, dtype=torch.int64), torch.arange(PROMPT)
    )
    function = lambda logits, _: logits.std()[None]  # noqa: E731
    (found,) = forward_only(model.chunks, [batch], function, False, model.layout)
    model.chunks[0].output_layer.weight.mul_(spread / float(found))


def _moved(masters: list[Tensor], step: float) -> list[Tensor]:
    """Move every weight by a step up or down."""
    generator = torch.Generator().manual_seed(2)

    def signs(weight: Tensor) -> Tensor:
        return torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8) * 2 - 1

    return [weight.add(signs(weight), alpha=step) for weight in masters]


def _elbos(
    model: DiffusionModel, masters: list[Tensor], prompts: Any, tokens: Tensor
) -> dict[str, Tensor]:
    """ELBOs per token of a policy whose weights are rounded to bf16: float64 ``[n]`` by kind."""

    def elbo(dtype: torch.dtype) -> Tensor:
        for parameter, weight in zip(model.chunks[0].parameters(), masters, strict=True):
            parameter.data = weight.bfloat16().to(dtype)
        found = estimate_elbo(model, prompts, tokens, num_mc=1, seed=5, rows_per_batch=4)
        return found.elbo.double() / tokens.size(1)

    with _megatrons_head(model):
        bf16 = elbo(torch.bfloat16)
    return {
        "bf16 logits": bf16,
        "float32 logits": elbo(torch.bfloat16),
        "exact": elbo(torch.float32),
    }


@contextmanager
def _megatrons_head(model: DiffusionModel) -> Iterator[None]:
    head = model.chunks[0].output_layer
    ours = head.__dict__.pop("_forward_impl")
    try:
        yield
    finally:
        head._forward_impl = ours


if __name__ == "__main__":
    main()
