"""The gradient of preference pairs: in layouts and either way that of the loss on all masks."""

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import Built, build_layout
from test_layouts import dashes, gradients_of
from torch import Tensor

from megatron_espo.config import EspoConfig
from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.objectives.dpo import Dpo
from megatron_espo.passes.batch import pack_sequences
from megatron_espo.passes.shapes import Shapes
from megatron_espo.rl.elbo import cut_views, elbo_of_views
from megatron_espo.rl.terms import Facts
from megatron_espo.rl.update import accumulate_facts

BETA, TOLERANCE = 0.7, 1e-5
# Two pairs; prompts and completions have different lengths.
PROMPTS = [[5, 7, 11, 3, 99], [5, 7, 11, 3, 99], [100, 4], [100, 4]]
COMPLETIONS = [torch.tensor(part) for part in ([9, 2, 257], [8, 257], [42, 17], [1, 4, 257])]
# Policy and reference are this far apart, in nats.
AWAY = torch.tensor([0.3, -0.8, -0.2, 0.9])
LAYOUTS = {
    "tp 2, pp 2, sequence parallel": (2, 2, ("--sequence-parallel",)),
    "cp 2, dp 2, distributed optimizer": (
        1, 1, ("--context-parallel-size", "2", "--use-distributed-optimizer"),
    ),
}  # fmt: skip


def all_masks() -> ElboViews:
    """Every mask of each completion as a draw; the mean over draws is the ELBO."""
    draws = 2**3 - 1
    masks = torch.zeros(len(COMPLETIONS), draws, 1, 3, dtype=torch.bool)
    weights = torch.zeros(len(COMPLETIONS), draws, 1)
    for i, completion in enumerate(COMPLETIONS):
        length = len(completion)
        places = itertools.product([False, True], repeat=length)
        for draw, mask in enumerate(itertools.islice(places, 1, None)):
            masks[i, draw, 0, :length] = torch.tensor(mask)
            weights[i, draw] = draws / (sum(mask) * math.comb(length, sum(mask)))
    return ElboViews(masks, weights)


def gradient(built: Built, mode: Any) -> dict[str, Tensor]:
    """The gradient of a step, as training takes it."""
    model, share = built.model, len(COMPLETIONS) // built.model.layout.dp_size
    rows = slice(model.layout.dp_rank * share, (model.layout.dp_rank + 1) * share)
    sequences = pack_sequences(
        PROMPTS[rows], COMPLETIONS[rows], model.pad_token_id, Shapes(model.pad_multiple * 2),
        together=2,
    )  # fmt: skip
    views = ElboViews(*(part[rows] for part in all_masks()[:2]))
    per_batch = 14 if mode == "joint" else 7
    for chunk in model.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    built.optimizer.zero_grad()
    batches = cut_views(model, sequences, views, per_batch)
    reference = elbo_of_views(model, batches, views) - AWAY[rows, None]
    nothing, settings = torch.zeros(share), EspoConfig(group_size=2)
    facts = Facts(None, reference, nothing, views, 3, settings, None, Dpo(BETA))
    accumulate_facts(model, batches, facts, mode, len(COMPLETIONS))
    gradients = gradients_of(built)
    built.optimizer.zero_grad()
    return gradients


def written_out(built: Built) -> dict[str, Tensor]:
    """Autograd through the loss in double precision, with a pass of the model for each mask."""
    (chunk,), elbos = built.model.chunks, []
    chunk.train()
    chunk.zero_grad_buffer()
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        tokens, length = torch.tensor([*prompt, *completion.tolist()]), len(completion)
        elbo = torch.zeros((), dtype=torch.float64)
        for size in range(1, length + 1):
            for masked in itertools.combinations(range(len(prompt), len(tokens)), size):
                inputs = tokens.clone()
                inputs[list(masked)] = 256
                hidden = torch.zeros(1, 1, len(tokens), len(tokens), dtype=torch.bool)
                logits = chunk(inputs[None], torch.arange(len(tokens))[None], hidden)[0]
                right = logits[list(masked), :262].double().log_softmax(1)
                right = right.gather(1, tokens[list(masked), None])
                elbo = elbo + right.sum() / size / math.comb(length, size)
        elbos.append(elbo)
    rewards = torch.stack(elbos)
    rewards = BETA * (rewards - rewards.detach() + AWAY.double())
    margins = rewards[::2] - rewards[1::2]
    (-margins.sigmoid().log()).mean().backward()
    return gradients_of(built)


@pytest.fixture(scope="module")
def expected(tokenizer_folder: str, checkpoints: dict[bool, str]) -> dict[str, Tensor]:
    flags = ("--pretrained-checkpoint", checkpoints[False])
    return written_out(build_layout(tokenizer_folder, 1, 1, flags, solo=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=dashes)
def test_gradients_are_those_of_the_written_out_loss_in_every_layout(
    layout: str,
    expected: dict[str, Tensor],
    tokenizer_folder: str,
    checkpoints: dict[bool, str],
) -> None:
    tp, pp, flags = LAYOUTS[layout]
    own = ("--pretrained-checkpoint", checkpoints[False], *flags)
    built = build_layout(tokenizer_folder, tp, pp, own)
    for mode in ("joint", "two_pass"):
        actual = gradient(built, mode)
        assert actual and actual.keys() <= expected.keys()
        for parameter, ours in actual.items():
            theirs = expected[parameter]
            error = (ours[:262] - theirs[:262]).abs().max() / theirs[:262].abs().max()
            assert error < TOLERANCE, f"{mode}, {parameter}: {error:.2e}"
