"""Which views of a completion an objective looks at: masks, prompt masks, weights.

All are functions of a random stream and global sample ids, like the ELBO's (diffusion.noise): the
same for every layout, every policy, and a run that was resumed.

Symbols: b completions, m draws, v views per draw, l completion length, p positions of prompts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_espo.diffusion.block_noise import completion_views
from megatron_espo.diffusion.noise import ElboEstimator, ElboViews, random_subset
from megatron_espo.random import Stream, substream, uniform


class Ask(NamedTuple):
    """Whose views are drawn.

    Attributes:
        key: random stream of the update.
        sample_ids: int64 ``[b]``.
        indices: int64 ``[b]``, places in the global batch.
        total: size of the global batch.
        length: l.
        num_draws: m.
        answers: int64 ``[b]``, tokens up to the first end of sequence, it included.
        prompt_width: p, of the longest prompt.
        block_length: tokens of a block of the sampler (--rollout-block-length).
        offsets: of a block-diffusion model int64 ``[b]``, places of the completion's first block
            that the prompt takes; None of another model.
        commit_steps: int32 ``[b, l]``, the sampler's step map (generation.sampler.Generation); None
            where the masks are not cut out of one.
    """

    key: Stream
    sample_ids: Tensor
    indices: Tensor
    total: int
    length: int
    num_draws: int
    answers: Tensor
    prompt_width: int
    block_length: int
    offsets: Tensor | None = None
    commit_steps: Tensor | None = None

    def uniform(self, purpose: str, draw: int, count: int) -> Tensor:
        """Draw float64 ``[b, count]`` for one of the draws."""
        return uniform(substream(self.key, purpose, draw), self.sample_ids, count)

    def hidden_prompts(self, probability: float) -> Tensor | None:
        """Mask prompt tokens with a probability: bool ``[b, m, 1, p]``, or None for 0."""
        if probability == 0.0:
            return None
        draws = [self.uniform("prompt", i, self.prompt_width) for i in range(self.num_draws)]
        return (torch.stack(draws, dim=1) < probability)[:, :, None]


class Masks:
    """Base class; see the subclasses.

    Attributes:
        per_draw: v.
        fixed: a draw masks the same number of tokens whatever is drawn.
        by_block: a block-diffusion model has such views, too: each block has its own.
        only_blocks: no other model has.
        of_steps: they are cut out of step maps, which the sampler then records.
    """

    per_draw: int = 1
    fixed: bool = False
    by_block: bool = False
    only_blocks: bool = False
    of_steps: bool = False

    def masked(self, length: int) -> float:
        """Expected number of predicted completion tokens of a draw's views together."""
        raise NotImplementedError

    def draw(self, ask: Ask) -> ElboViews:
        """Draw the views of some completions, on the host."""
        raise NotImplementedError

    def prompt_masks(self, ask: Ask) -> Tensor | None:
        """Draw the prompt tokens that are masked, too, without being predicted.

        Returns:
            bool ``[b, m, v or 1, p]``, or None for none; places after a prompt's end mean nothing.
        """
        return None


@dataclass(frozen=True)
class ElboMasks(Masks):
    """The views of an ELBO estimate.

    Attributes:
        estimator: forward process (--espo-elbo-estimator).
        independent_draws: see `diffusion.noise.elbo_views`.
    """

    estimator: ElboEstimator = "coupled"
    independent_draws: bool = False
    by_block = True

    @property
    def per_draw(self) -> int:  # type: ignore[override]
        """See Masks."""
        return 2 if self.estimator == "coupled" else 1

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        """See Masks."""
        return self.estimator == "coupled"

    def masked(self, length: int) -> float:
        """See Masks."""
        expected = {"coupled": length, "exact_count": (length + 1) / 2, "bernoulli": length / 2}
        return expected[self.estimator]

    def draw(self, ask: Ask) -> ElboViews:
        """See Masks."""
        return completion_views(
            self.estimator,
            ask.key,
            ask.sample_ids,
            ask.indices,
            ask.total,
            ask.length,
            ask.num_draws,
            offsets=ask.offsets,
            block_size=ask.block_length,
            independent_draws=self.independent_draws,
        )


@dataclass(frozen=True)
class HalfPairs(Masks):
    """A coupled pair as the ELBO draws it, both sides weighted 1/2."""

    per_draw, fixed = 2, True

    def masked(self, length: int) -> float:
        """See Masks."""
        return length

    def draw(self, ask: Ask) -> ElboViews:
        """See Masks."""
        pairs = ElboMasks().draw(ask)
        return pairs._replace(weights=torch.full_like(pairs.weights, 0.5))


@dataclass(frozen=True)
class OnePass(Masks):
    """The whole completion masked, and prompt tokens with a probability; weight 1.

    Attributes:
        prompt_probability: of each prompt token.
    """

    prompt_probability: float = 0.0
    per_draw, fixed = 1, True

    def masked(self, length: int) -> float:
        """See Masks."""
        return length

    def draw(self, ask: Ask) -> ElboViews:
        """See Masks."""
        shape = (len(ask.sample_ids), ask.num_draws, 1)
        masks = torch.ones(*shape, ask.length, dtype=torch.bool)
        return ElboViews(masks, torch.ones(shape))

    def prompt_masks(self, ask: Ask) -> Tensor | None:
        """See Masks."""
        return ask.hidden_prompts(self.prompt_probability)


@dataclass(frozen=True)
class CoupledViews(Masks):
    """Three views: all masked; each token with probability t ~ U(low, high); the others.

    Their weights are 1, 1/t and 1/(1-t).

    Attributes:
        low: smallest t.
        high: largest t.
    """

    low: float = 0.2
    high: float = 0.8
    per_draw, fixed = 3, True

    def masked(self, length: int) -> float:
        """See Masks."""
        return 2 * length

    def draw(self, ask: Ask) -> ElboViews:
        """See Masks."""
        masks, weights = [], []
        for i in range(ask.num_draws):
            numbers = ask.uniform("mask", i, ask.length + 1)
            t = self.low + (self.high - self.low) * numbers[:, 0]
            side = numbers[:, 1:] < t[:, None]
            masks.append(torch.stack((torch.ones_like(side), side, ~side), dim=1))
            weights.append(torch.stack((torch.ones_like(t), 1 / t, 1 / (1 - t)), dim=1))
        return ElboViews(torch.stack(masks, dim=1), torch.stack(weights, dim=1).float())


@dataclass(frozen=True)
class Blockwise(Masks):
    """A random block of the answer with a random number of its tokens masked, and all after it.

    Draws of a completion take different blocks while there are any. Tokens before the block, the
    prompt's among them, are masked with a probability. Weight 1.

    Attributes:
        prompt_probability: of each token before the block.
    """

    prompt_probability: float = 0.15
    per_draw = 1

    def masked(self, length: int) -> float:
        """See Masks."""
        return length / 2

    def draw(self, ask: Ask) -> ElboViews:
        """See Masks."""
        places = torch.arange(ask.length)[None]
        blocks = ask.length // ask.block_length
        used = (ask.answers - 1) // ask.block_length + 1
        order = uniform(substream(ask.key, "block"), ask.sample_ids, blocks)
        order = order.argsort(dim=1, stable=True)
        masks = []
        for i in range(ask.num_draws):
            start = (order[:, i % blocks] % used * ask.block_length)[:, None]
            end = torch.minimum(start + ask.block_length, ask.answers[:, None])
            inside = (places >= start) & (places < end)
            numbers = ask.uniform("mask", i, ask.length + 1)
            size = (end - start)[:, 0]
            count = 1 + (numbers[:, 0] * size).long().clamp(max=size - 1)
            chosen = random_subset(substream(ask.key, "subset", i), ask.sample_ids, inside, count)
            before = (places < start) & (numbers[:, 1:] < self.prompt_probability)
            masks.append(chosen | before | (places >= end))
        shape = (len(order), ask.num_draws, 1)
        return ElboViews(torch.stack(masks, dim=1)[:, :, None], torch.ones(shape))

    def prompt_masks(self, ask: Ask) -> Tensor | None:
        """See Masks."""
        return ask.hidden_prompts(self.prompt_probability)


@dataclass(frozen=True)
class Quadrature(Masks):
    """A fixed grid of mask ratios with Gauss-Legendre weights in place of random ones.

    ELBO = integral over t in (0, 1) of f(t)/t with f the expected log-probability summed over the
    masked tokens; a node t masks floor(t l) tokens, one at least, and is weighted by its Gauss
    weight over the ratio that was masked.

    Attributes:
        nodes: v, at most l.
    """

    nodes: int = 3
    fixed = True

    @property
    def per_draw(self) -> int:  # type: ignore[override]
        """See Masks."""
        return self.nodes

    def _grid(self, length: int) -> tuple[Tensor, Tensor]:
        """Masked tokens int64 ``[v]`` and weights float32 ``[v]``."""
        # Golub and Welsch: nodes and weights from the Jacobi matrix of Legendre's polynomials.
        k = torch.arange(1, self.nodes, dtype=torch.float64)
        off = k / (4 * k * k - 1).sqrt()
        values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
        counts = ((values + 1) / 2 * length).floor().long().clamp(min=1)
        return counts, (vectors[0].square() * length / counts).float()

    def masked(self, length: int) -> float:
        """See Masks."""
        return float(self._grid(length)[0].sum())

    def draw(self, ask: Ask) -> ElboViews:
        """See Masks."""
        counts, weights = self._grid(ask.length)
        b = len(ask.sample_ids)
        everywhere = torch.ones(b, ask.length, dtype=torch.bool)
        masks = [
            torch.stack(
                [
                    random_subset(
                        substream(substream(ask.key, "mask", i), "node", node),
                        ask.sample_ids, everywhere, count.expand(b),
                    )
                    for node, count in enumerate(counts)
                ],
                dim=1,
            )
            for i in range(ask.num_draws)
        ]  # fmt: skip
        return ElboViews(torch.stack(masks, dim=1), weights.expand(b, ask.num_draws, -1).clone())
