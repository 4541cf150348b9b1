"""Other objectives than ESPO's have the same gradient in every layout and either way."""

from functools import partial

import pytest
import torch
from conftest import Built, build_layout
from test_layouts import N, dashes, gradients_of, own_rows, prompts_and_completions
from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.objectives import (
    load_objective,
    num_draws,
    objective_of,
    views_per_completion,
)
from megatron_espo.objectives.masks import Ask
from megatron_espo.passes.batch import pack_sequences
from megatron_espo.passes.shapes import Shapes
from megatron_espo.random import stream, uniform
from megatron_espo.rl.elbo import block_offsets, cut_views
from megatron_espo.rl.terms import answers_of, log_probabilities
from megatron_espo.rl.update import accumulate_gradient

LENGTH, TOLERANCE = 8, 1e-5
# Tokens of one pass and of three views, bounds of whole groups, draws of another weight, a pass for
# each token, one for each step and for two of them, an advantage for each term.
NAMES = (
    "diffu_grpo", "coupled_grpo", "wd1", "stable_drl", "gdsd", "just_grpo", "cj_grpo", "trace_rl",
    "ospo",
)  # fmt: skip
# Of models whose tokens come block by block: ratios of whole block ELBOs.
IN_BLOCKS = ("ebpo",)
BLOCKS = ("--attention-mask", "block-causal", "--block-size", "4")
# Five steps of eight tokens.
ROLLOUT = RolloutConfig(LENGTH, LENGTH, 5)
LAYOUTS = {
    "tp 2, pp 2, sequence parallel, head in chunks": (
        2, 2, ("--sequence-parallel", "--head-chunk", "5"),
    ),
    "cp 2, dp 2": (1, 1, ("--context-parallel-size", "2")),
}  # fmt: skip
Gradients = dict[str, Tensor]


def gradient(built: Built, name: str, mode: str) -> Gradients:
    """The gradient of one update, with old and reference values apart from the policy's own."""
    prompts, completions = prompts_and_completions()
    rows, model = own_rows(built), built.model
    size = None if model.blocks is None else model.blocks.size
    lengths = torch.tensor([7, 3, 8, 1, 5, 8, 2, 6])[rows]
    settings = ("merged=2",) if name == "trace_rl" else ()
    fitted = load_objective(name, settings).fitted(ROLLOUT, size)
    espo = EspoConfig(
        objective=name, gradient=mode, num_mc=2, prompts_per_rollout=4, group_size=2,
        objective_args=[*settings, *fitted] or None,
        kl_coef=0.05 if "kl_coef" in load_objective(name).honours else 0.0,
    )  # fmt: skip
    objective, ids = objective_of(espo), torch.arange(N)[rows]
    sequences = pack_sequences(
        prompts[rows], completions[rows], model.pad_token_id, Shapes(model.pad_multiple * 2)
    )
    masks = objective.masks(espo)
    ask = Ask(
        key=stream(5, "elbo"), sample_ids=ids, indices=ids, total=N, length=LENGTH,
        num_draws=num_draws(espo), answers=(lengths + 1).clamp(max=LENGTH),
        prompt_width=int(sequences.prompt_lengths.max()), block_length=4,
        commit_steps=((ids[:, None] + 3 * torch.arange(LENGTH)) % (2 + ids[:, None] % 4)).int(),
        offsets=block_offsets(model, sequences),
    )  # fmt: skip
    views = masks.draw(ask)
    per_batch = views_per_completion(espo) * (1 if mode == "joint" else 2)
    recut = partial(
        cut_views, model, sequences, views, per_batch, prompt_masks=masks.prompt_masks(ask)
    )
    for chunk in model.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    built.optimizer.zero_grad()
    batches = recut()
    base = log_probabilities(model, batches, views, objective)
    noise = uniform(stream(9, "terms"), torch.arange(N), 2 * base[0].numel())[rows].float()
    old, ref = (base + part.view_as(base) - 0.5 for part in noise.chunk(2, dim=1))
    advantages = torch.tensor([0.9, -0.9, 0.0, 0.0, 1.3, -1.3, -0.4, 0.4])[rows]
    shares = (ids[:, None] + 5 * torch.arange(LENGTH)) % 7 / 3
    found = accumulate_gradient(
        model, batches, views, old, ref if espo.kl_coef else None, advantages, LENGTH, espo, N,
        recut, answers_of(lengths, LENGTH, model.layout),
        advantages[:, None] * shares if objective.credit() else None,
    )  # fmt: skip
    torch.testing.assert_close(found.draws, base, rtol=1e-5, atol=1e-4)
    gradients = gradients_of(built)
    built.optimizer.zero_grad()
    return gradients


@pytest.fixture(scope="module")
def expected(tokenizer_folder: str, checkpoints: dict[bool, str]) -> dict[str, Gradients]:
    """On one rank, joint where that can be."""
    flags = ("--pretrained-checkpoint", checkpoints[False])
    found = {}
    for names, own in ((NAMES, ()), (IN_BLOCKS, BLOCKS)):
        solo = build_layout(tokenizer_folder, 1, 1, (*flags, *own), solo=True)
        for name in names:
            found[name] = gradient(solo, name, "two_pass" if name == "stable_drl" else "joint")
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=dashes)
def test_gradients_do_not_depend_on_layout_and_mode(
    layout: str,
    expected: dict[str, Gradients],
    tokenizer_folder: str,
    checkpoints: dict[bool, str],
) -> None:
    tp, pp, flags = LAYOUTS[layout]
    own = ("--pretrained-checkpoint", checkpoints[False], *flags)
    for names, more in ((NAMES, ()), (IN_BLOCKS, BLOCKS)):
        built = build_layout(tokenizer_folder, tp, pp, (*own, *more))
        for name in names:
            assert_equal_gradients(built, name, expected[name])


def assert_equal_gradients(built: Built, name: str, expected: Gradients) -> None:
    for mode in ("two_pass",) if name == "stable_drl" else ("joint", "two_pass"):
        actual = gradient(built, name, mode)
        assert actual and actual.keys() <= expected.keys()
        for parameter, ours in actual.items():
            theirs = expected[parameter]
            error = (ours[:262] - theirs[:262]).abs().max() / theirs[:262].abs().max()
            assert error < TOLERANCE, f"{name}, {mode}, {parameter}: {error:.2e}"
