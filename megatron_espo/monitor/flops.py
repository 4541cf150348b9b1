"""Floating-point operations of model passes: pure functions of shapes, nothing measured.

Counted are the matrix products, two operations per multiply-add: projections, attention scores
and their application, gated MLP, output head. Norms, softmax, rotary positions and sampling are
left out, as is usual for MFU (model FLOPs utilization; PaLM, arXiv 2204.02311, appendix B). A
backward pass costs twice its forward pass; a frozen weight under LoRA adapters has no gradient of
its own, so that its product costs as much again, not twice. What activation recomputation repeats
is not counted; what the algorithm asks for (the gradient-free pass of ``two_pass``, the frozen
policies) is.

Five things differ from the count of a causal language model:

* attention is bidirectional: every position sees every other, nothing is halved;
* the output head runs on chosen rows only, so that its share is counted in rows;
* the last layer leaves out the positions that nothing reads (passes/state.py);
* a rollout is many full passes: one per denoising step, not one per token;
* models whose tokens come block by block pass noisy copies of a row beside its clean tokens. Of
  their attention all is counted that is computed, whether the mask hides it or not.

Rows are counted at the width that they are given, the same for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_espo.config import DpoConfig, EspoConfig, RolloutConfig
from megatron_espo.generation.remasking import DREAM_ORDERS, commit_counts, dream_commit_counts
from megatron_espo.monitor.dimensions import ModelDimensions as ModelDimensions
from megatron_espo.objectives import num_draws, objective_of, views_per_completion
from megatron_espo.objectives.masks import ElboMasks


class _Parts(NamedTuple):
    """Operations of a pass: of the model's weights, of adapters, of attention."""

    weights: float
    adapters: float
    attention: float


def forward_flops(
    model: ModelDimensions,
    rows: float,
    positions: int,
    head_rows: float,
    keys: int | None = None,
) -> float:
    """Count one forward pass.

    The last layer works on the positions that are read only, but for its keys and values.

    Args:
        model: dimensions.
        rows: sequences in the batch.
        positions: positions per sequence that pass through the layers.
        head_rows: hidden states, over all sequences, that reach the output head.
        keys: positions that each position attends to; None for ``positions`` (no cache). Without
            them the sequences of a block model are views, so many of which share a row as
            ``model.blocks`` says.

    Returns:
        Operations. Attention of the last layer is counted as if all sequences had the same number
        of positions that are read; where they differ, the shorter ones are filled up.
    """
    return sum(_forward(model, rows, positions, head_rows, keys))


def _forward(
    model: ModelDimensions,
    rows: float,
    positions: int,
    head_rows: float,
    keys: int | None = None,
) -> _Parts:
    if keys is None and model.blocks is not None:
        copies = model.blocks.copies
        sequences, width = rows / copies, (copies + 1) * positions
        read = min(head_rows, sequences * width)
        pairs = sequences * model.blocks.pairs(positions)
        return _parts(model, sequences * width, pairs, head_rows, read * width)
    keys = positions if keys is None else keys
    passed = rows * positions
    read = min(head_rows, passed)
    return _parts(model, passed, passed * keys, head_rows, read * keys)


def passed_flops(
    model: ModelDimensions, positions: float, pairs: float, head_rows: float, head_pairs: float
) -> float:
    """Count passes of any widths by what went through them; see :func:`forward_flops`.

    Args:
        model: dimensions.
        positions: positions that passed through the layers, of all sequences and passes.
        pairs: each of them times the keys that it attended to.
        head_rows: hidden states that reached the output head.
        head_pairs: each of them times its keys.

    Returns:
        Operations.
    """
    return sum(_parts(model, positions, pairs, head_rows, head_pairs))


def _parts(
    model: ModelDimensions, positions: float, pairs: float, head_rows: float, head_pairs: float
) -> _Parts:
    attention_size = model.num_attention_heads * model.head_dim
    key_value_size = model.num_query_groups * model.head_dim
    inputs = model.hidden_size * (attention_size + 2 * key_value_size)  # q, k, v
    outputs = attention_size * model.hidden_size  # output projection
    first, others, of_head = model.adapters or (0, 0, 0)
    weights = head_rows * model.hidden_size * model.vocab_size
    adapters, attention = head_rows * of_head, 0.0
    if model.num_layers:
        all_read = model.num_layers * positions
        some_read = (model.num_layers - 1) * positions + min(head_rows, positions)
        weights += all_read * inputs + some_read * outputs
        *before, last = _feed_forward(model)
        weights += positions * sum(before) + min(head_rows, positions) * last
        adapters += all_read * first + some_read * others
        # Scores (one product per key and channel), and as many to apply them to the values.
        attention = ((model.num_layers - 1) * pairs + head_pairs) * 2 * attention_size
    return _Parts(2.0 * weights, 2.0 * adapters, 2.0 * attention)


def _feed_forward(model: ModelDimensions) -> list[int]:
    """List the weights of each layer's feed-forward part that a token passes."""
    products = (3 if model.gated else 2) * model.hidden_size
    dense = products * model.ffn_hidden_size
    mixture = products * model.active_size + model.hidden_size * model.num_experts
    layers = model.mixtures or (0,) * model.num_layers
    return [mixture if one else dense for one in layers]


def training_flops(model: ModelDimensions, rows: float, positions: int, head_rows: float) -> float:
    """Count a forward and backward pass.

    The backward pass is twice the forward pass, or once for weights that are frozen.

    Args:
        model: dimensions.
        rows: sequences.
        positions: positions per sequence.
        head_rows: predicted (masked) positions over all sequences.

    Returns:
        Operations.
    """
    weights, adapters, attention = _forward(model, rows, positions, head_rows)
    frozen = model.adapters is not None
    return (2.0 if frozen else 3.0) * weights + 3.0 * (adapters + attention)


def generation_flops(
    model: ModelDimensions, rows: float, positions: int, config: RolloutConfig
) -> float:
    """Count the sampling of completions by its settings alone, for planning.

    Approximate caches, parallel decoding and early stop are left out: what they save shows when
    they run (:func:`passed_flops`).

    The head runs on the candidates of each step: the positions of the block that are still masked
    for orders that rank them, or just those that will be committed for ``random`` and ``origin``.

    Args:
        model: dimensions.
        rows: completions.
        positions: padded width of a row, prompt and completion.
        config: sampling settings.

    Returns:
        Operations.
    """
    blocks = config.completion_length // config.block_length
    steps = config.denoising_steps // blocks
    schedule = dream_commit_counts if config.remasking in DREAM_ORDERS else commit_counts
    counts = schedule(config.block_length, steps)
    if config.remasking == "origin":
        # Each token is committed once, at a step that is drawn; every step may run.
        candidates, evaluations = config.block_length, steps
    else:
        ran = [step for step in range(steps) if counts[step]]
        evaluations = len(ran)
        left = [config.block_length - sum(counts[:step]) for step in ran]
        decided = config.remasking == "random"
        candidates = config.block_length if decided else sum(left)
    if model.blocks is not None:
        return _block_generation(model, rows, positions, config, evaluations, candidates)
    # Classifier-free guidance passes every row twice.
    copies = 2 if config.guidance_scale > 0.0 else 1
    passes = blocks * evaluations * copies * rows
    head_rows = blocks * candidates * copies * rows
    return forward_flops(model, passes, positions, head_rows)


def _block_generation(
    model: ModelDimensions,
    rows: float,
    positions: int,
    config: RolloutConfig,
    evaluations: int,
    candidates: int,
) -> float:
    """Count sampling block by block, with prompts that end with a block.

    Args:
        model: dimensions.
        rows: completions.
        positions: of a row.
        config: sampling settings.
        evaluations: denoising steps of a block.
        candidates: hidden states that reach the head in them.

    Returns:
        Operations.
    """
    k, blocks = config.block_length, config.completion_length // config.block_length
    prompt = positions - config.completion_length
    read = float(blocks * candidates)
    if config.cache == "exact":
        # Each finished block but the last one passes once more, for its keys and values.
        windows = (blocks * evaluations + blocks - 1) * k
        before = _parts(model, prompt, prompt**2, 0.0, 0.0)
        steps = _parts(model, windows, windows * positions, read, read * positions)
        return rows * (sum(before) + sum(steps))
    widths = [prompt + (block + 1) * k for block in range(blocks)]
    passed, pairs = (evaluations * sum(w**power for w in widths) for power in (1, 2))
    return rows * sum(_parts(model, passed, pairs, read, candidates * sum(widths)))


def elbo_flops(
    model: ModelDimensions,
    completions: float,
    positions: int,
    length: int,
    espo: EspoConfig,
    count: Callable[[ModelDimensions, float, int, float], float] = forward_flops,
) -> float:
    """Count one evaluation of the ELBOs of some completions.

    Args:
        model: dimensions.
        completions: how many, on all ranks.
        positions: padded width of a row.
        length: completion length.
        espo: estimator and number of draws.
        count: counts its passes, without gradients or with them (:func:`training_flops`).

    Returns:
        Operations, with the expected number of masked positions where it is not fixed.
    """
    masked = objective_of(espo).masks(espo).masked(length)
    head_rows = completions * num_draws(espo) * masked
    rows = completions * views_per_completion(espo)
    return count(model, rows, positions, head_rows)


@dataclass(frozen=True)
class RolloutFlops:
    """Operations of one rollout and its updates, all ranks together.

    Attributes:
        generation: sampling the completions.
        old_elbo: ELBOs of the sampling policy, for every update but the first.
        ref_elbo: ELBOs of the reference policy; 0 without a KL penalty.
        update: forward and backward of all inner updates, and the gradient-free pass of each with
            ``two_pass``.
    """

    generation: float
    old_elbo: float
    ref_elbo: float
    update: float

    @property
    def total(self) -> float:
        """All phases."""
        return self.generation + self.old_elbo + self.ref_elbo + self.update


def rollout_flops(
    model: ModelDimensions,
    positions: int,
    espo: EspoConfig,
    rollout: RolloutConfig,
    left_out: float = 0.0,
) -> RolloutFlops:
    """Count a rollout with its updates.

    Args:
        model: dimensions.
        positions: padded width of a row: the longest prompt of the rank and the completion.
        espo: group sizes, updates, draws; ``auto`` counts as joint, which it is unless the
            micro-batches are smaller than a sequence's views (entry points have settled that).
        rollout: sampling settings.
        left_out: share of the completions of an update that have no backward pass.

    Returns:
        Operations by phase.
    """
    completions, mu = espo.completions_per_rollout, espo.updates_per_rollout
    asked = (completions, positions, rollout.completion_length, espo)
    one, trained = elbo_flops(model, *asked), elbo_flops(model, *asked, training_flops)
    # The reference policy of adapters is their base.
    ref = elbo_flops(model.base, *asked)
    # What has no backward pass is evaluated all the same.
    objective = objective_of(espo)
    extra = 1.0 if espo.gradient == "two_pass" and not objective.linear else left_out
    return RolloutFlops(
        generation=generation_flops(model, completions, positions, rollout),
        old_elbo=(mu - 1) * one if objective.compares_with_old else 0.0,
        ref_elbo=mu * ref if espo.kl_coef > 0.0 else 0.0,
        update=mu * (trained * (1.0 - left_out) + one * extra),
    )


def preference_flops(
    model: ModelDimensions,
    pairs: float,
    positions: int,
    length: float,
    dpo: DpoConfig,
    mode: Literal["joint", "two_pass"],
) -> RolloutFlops:
    """Count an optimizer step of preference optimization.

    Args:
        model: dimensions.
        pairs: of the step, on all ranks.
        positions: width of a row, prompt and completion.
        length: tokens of a completion on average.
        dpo: estimator and number of draws.
        mode: the way to the gradient.

    Returns:
        Operations by phase; nothing is sampled, and there is no old policy.
    """
    rows = 2 * pairs * dpo.views_per_completion
    masks = ElboMasks(dpo.elbo_estimator)
    # Linear in the length, up to a constant.
    masked = masks.masked(0) + length * (masks.masked(1) - masks.masked(0))
    asked = (rows, positions, 2 * pairs * dpo.num_mc * masked)
    update = training_flops(model, *asked)
    if mode == "two_pass":
        update += forward_flops(model, *asked)
    return RolloutFlops(0.0, 0.0, forward_flops(model.base, *asked), update)
