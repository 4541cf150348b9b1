"""The work that is timed: rollouts and ESPO updates, on either side, from the same weights."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks import straightforward
from benchmarks.confident import read_prompts, reward
from benchmarks.models import (
    SHAPES,
    Shape,
    build_random,
    build_trained,
    llama_oracle,
    random_prompts,
)
from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.conversion.verification import quiet
from megatron_espo.diffusion.noise import ElboViews, elbo_views
from megatron_espo.generation.sampler import Generation, generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.monitor.flops import ModelDimensions, elbo_flops, training_flops
from megatron_espo.objectives import views_per_completion
from megatron_espo.passes.batch import pack_sequences, view_batches
from megatron_espo.random import stream
from megatron_espo.rl.update import accumulate_gradient


@dataclass(frozen=True)
class Workload:
    """Sizes of a measurement.

    Attributes:
        shape: the model.
        rows: completions sampled at once.
        prompt_length: tokens of every prompt.
        rollout: sampling settings of both sides.
        sequences: completions of an ESPO update.
        num_mc: coupled draws per ELBO.
        trained: --save folder of a trained model of this shape; random weights if None.
        head_scale: factor on the output head's weights. Random weights are confident of nothing;
            a large factor makes their softmax peaked, so that a threshold has something to commit.
        sides: names of this project's rollouts to measure; all that make sense if empty.
        held_out: prompts that a trained model's reward is measured on.
    """

    shape: Shape
    rows: int = 2
    prompt_length: int = 128
    rollout: RolloutConfig = field(
        default=RolloutConfig(
            completion_length=128, block_length=32, denoising_steps=64, temperature=0.0
        )
    )
    sequences: int = 2
    num_mc: int = 2
    trained: str | None = None
    head_scale: float = 1.0
    sides: tuple[str, ...] = ()
    held_out: int = 64

    def build(self) -> DiffusionModel:
        """Build this project's model, without what Megatron prints meanwhile."""
        with quiet():
            trained = self.trained
            model = build_random(self.shape) if trained is None else build_trained(trained)
        (chunk,) = unwrap_model(list(model.chunks))
        with torch.no_grad():
            chunk.output_layer.weight.mul_(self.head_scale)
        return model

    def prompts(self, count: int) -> Sequence[Sequence[int]]:
        """Draw prompts; a trained model gets held-out ones of its own language."""
        if self.trained is None:
            return random_prompts(count, self.prompt_length, self.shape)
        return [prompt[: self.prompt_length] for prompt in read_prompts(self.trained, count)]

    def small(self) -> "Workload":
        """The same work at a size that costs nothing, to load what is loaded at first use."""
        rollout = replace(self.rollout, completion_length=4, block_length=4, denoising_steps=1)
        return replace(self, rows=1, sequences=1, prompt_length=4, rollout=rollout)


def add_sizes(add: Callable[..., Any]) -> None:
    """Add the flags that :func:`sized` reads, with the defaults of a Workload.

    Args:
        add: a parser's ``add_argument``.
    """
    default = Workload(SHAPES["smoke"])
    add("--rows", type=int, default=default.rows, help="completions sampled at once")
    add("--prompt-length", type=int, default=default.prompt_length)
    add("--completion-length", type=int, default=default.rollout.completion_length)
    add("--block-length", type=int, default=default.rollout.block_length)


def sized(work: Workload, options: Namespace, temperature: float = 0.0) -> Workload:
    """Give work the sizes of a command line.

    Args:
        work: the rest.
        options: with those of :func:`add_sizes`, and ``denoising_steps``.
        temperature: of the rollouts.

    Returns:
        The work.

    Raises:
        UserError: the sizes do not fit together.
    """
    rollout = replace(
        work.rollout,
        completion_length=options.completion_length,
        block_length=options.block_length,
        denoising_steps=options.denoising_steps,
        temperature=temperature,
        micro_batch_size=options.rows,
    )
    rollout.validate()
    return replace(work, rows=options.rows, prompt_length=options.prompt_length, rollout=rollout)


def our_rollout(model: DiffusionModel, work: Workload, config: RolloutConfig) -> Generation:
    """Sample with this project."""
    for chunk in model.chunks:
        chunk.eval()
    ids = torch.arange(work.rows)
    return generate(model, work.prompts(work.rows), ids, config, 1, "benchmark")


def held_out_reward(model: DiffusionModel, work: Workload, config: RolloutConfig) -> float:
    """Complete held-out prompts of a trained model's language; returns the mean reward."""
    held_out = replace(work, rows=work.held_out)
    tokens = our_rollout(model, held_out, replace(config, micro_batch_size=16)).completions
    rewards = [
        reward(bytes(prompt).decode(), "".join(map(chr, completion)))
        for prompt, completion in zip(held_out.prompts(held_out.rows), tokens.tolist(), strict=True)
    ]
    return sum(rewards) / len(rewards)


def their_rollout(llama: LlamaForCausalLM, work: Workload, temperature: float) -> Tensor:
    """Sample with the straightforward implementation."""
    return straightforward.generate(
        llama,
        torch.tensor(work.prompts(work.rows)),
        work.shape.mask_token_id,
        completion_length=work.rollout.completion_length,
        block_length=work.rollout.block_length,
        denoising_steps=work.rollout.denoising_steps,
        temperature=temperature,
        generator=torch.Generator().manual_seed(1),
    )


@dataclass(frozen=True)
class Update:
    """Inputs of one ESPO update: completions, masks, the sampling policy's ELBOs, advantages."""

    prompts: Sequence[Sequence[int]]
    completions: Tensor
    views: ElboViews
    elbo_old: Tensor
    advantages: Tensor


def make_update(work: Workload) -> Update:
    """Draw the inputs of an update; the old ELBOs are those of a model that knows nothing."""
    n, length = work.sequences, work.rollout.completion_length
    completions = torch.tensor(random_prompts(n, length, work.shape, seed=9))
    ids = torch.arange(n)
    views = elbo_views("coupled", stream(1, "benchmark"), ids, ids, n, length, work.num_mc)
    old = -torch.full((n, work.num_mc), float(length)) * torch.tensor(work.shape.vocab_size).log()
    advantages = torch.linspace(-1.0, 1.0, n) if n > 1 else torch.ones(1)
    return Update(work.prompts(n), completions, views, old, advantages)


def our_update(
    model: DiffusionModel,
    work: Workload,
    gradient: str,
    head_chunk: int | None = None,
    sequences_per_batch: int = 1,
    update: Update | None = None,
) -> Tensor:
    """Add an update's gradient with this project; returns the ELBO draws, ``[n, m]``.

    A micro-batch holds all views of some sequences, by default of one. The inputs are those of
    :func:`make_update`, or others that were drawn the same way.
    """
    update = update or make_update(work)
    for chunk in unwrap_model(list(model.chunks)):
        chunk.output_layer.chunk_rows = head_chunk  # as --head-chunk does
    for chunk in model.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    sequences = pack_sequences(update.prompts, update.completions, model.pad_token_id, model.shapes)
    batches = view_batches(
        sequences,
        update.views,
        model.mask_token_id,
        model.vocab_size,
        2 * work.num_mc * sequences_per_batch,
        same_width=model.layout.pp_size > 1,
    )
    config = EspoConfig(num_mc=work.num_mc, kl_coef=0.0, gradient=gradient)  # type: ignore[arg-type]
    return accumulate_gradient(
        model,
        batches,
        update.views,
        update.elbo_old,
        None,
        update.advantages,
        work.rollout.completion_length,
        config,
        work.sequences,
    ).draws


def update_flops(work: Workload) -> dict[bool, float]:
    """Count the operations of an update, of this project's (True) and of a straightforward one.

    The latter computes all positions in all layers and the logits of all of them.
    """
    shape, length = work.shape, work.rollout.completion_length
    size, heads = shape.hidden_size, shape.num_heads
    dimensions = ModelDimensions(
        shape.num_layers, size, 3 * size, heads, heads, size // heads, shape.vocab_size
    )
    positions, espo = work.prompt_length + length, EspoConfig(num_mc=work.num_mc)
    rows = work.sequences * views_per_completion(espo)
    ours = elbo_flops(dimensions, work.sequences, positions, length, espo, training_flops)
    return {True: ours, False: training_flops(dimensions, rows, positions, rows * positions)}


def their_update(llama: LlamaForCausalLM, work: Workload, pass_per_mask: bool) -> Tensor:
    """Add an update's gradient with the straightforward implementation; ELBOs ``[n, m]``."""
    update = make_update(work)
    for parameter in llama.parameters():
        # Zeros that are there from the start, like the gradient buffers of the other side.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.zero_()
    tokens = torch.cat((torch.tensor(update.prompts), update.completions), dim=1)
    elbo = straightforward.coupled_elbo(
        llama,
        tokens,
        work.prompt_length,
        update.views.mask_indices,
        work.shape.mask_token_id,
        pass_per_mask=pass_per_mask,
    )
    length = work.rollout.completion_length
    loss = straightforward.espo_loss(elbo, update.elbo_old, update.advantages, length).mean()
    torch.autograd.backward(loss)
    return elbo.detach()


# What the memory of a fresh process is measured with.


def prepare_our_rollout(work: Workload, config: RolloutConfig) -> Callable[[bool], Any]:
    """Build for sampling; see measure.peak_memory."""
    model = work.build()

    def run(small: bool) -> None:
        if small:
            our_rollout(model, work.small(), work.small().rollout)
        else:
            our_rollout(model, work, config)

    return run


def prepare_their_rollout(work: Workload) -> Callable[[bool], Any]:
    """Build for sampling; see measure.peak_memory."""
    llama = llama_oracle(work.build(), work.shape)
    return lambda small: their_rollout(
        llama, work.small() if small else work, work.rollout.temperature
    )


def prepare_our_update(
    work: Workload, gradient: str, head_chunk: int | None
) -> Callable[[bool], Any]:
    """Build for updates; see measure.peak_memory."""
    model = work.build()
    return lambda small: our_update(model, work.small() if small else work, gradient, head_chunk)


def prepare_their_update(work: Workload, pass_per_mask: bool) -> Callable[[bool], Any]:
    """Build for updates; see measure.peak_memory."""
    llama = llama_oracle(work.build(), work.shape)
    return lambda small: their_update(llama, work.small() if small else work, pass_per_mask)
