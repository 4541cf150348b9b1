"""Objectives against references in Python floats, on all masks of short completions."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from objective_references import REFERENCES, Group
from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.diffusion.noise import ElboViews
from megatron_espo.errors import UserError
from megatron_espo.monitor.flops import (
    ModelDimensions,
    RolloutFlops,
    forward_flops,
    rollout_flops,
)
from megatron_espo.objectives import (
    BUILT_IN,
    Given,
    Objective,
    check_objective,
    chosen_gradient,
    load_objective,
    loss_gradient,
    num_draws,
    objective_of,
    views_per_completion,
)
from megatron_espo.objectives.advantages import load_advantage
from megatron_espo.objectives.block_masks import StratifiedBlocks
from megatron_espo.objectives.masks import (
    Ask,
    Blockwise,
    CoupledViews,
    Masks,
    OnePass,
    Quadrature,
)
from megatron_espo.objectives.ordered_views import BlockPrefixes, Prefixes
from megatron_espo.objectives.step_views import StepViews
from megatron_espo.random import stream
from megatron_espo.rl.terms import combine

LENGTH, SIZE = 3, 4
# Every subset of three tokens is the first draw's mask of one completion, another the second's.
SUBSETS = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))
B = len(SUBSETS)
ANSWERS = torch.tensor([3, 1, 2, 3, 3, 2, 1, 3])
ADVANTAGES = torch.tensor([1.5, -0.5, 0.0, -1.0, 0.7, 2.0, -2.0, -0.7], dtype=torch.float64)
# Of objectives that split them: other means than ADVANTAGES, none of another sign, some zero.
TOKEN_ADVANTAGES = ADVANTAGES[:, None] * torch.linspace(0, 2.3, B * LENGTH).double().view(
    LENGTH, B
).T.roll(3, 0)
# Model evaluations that committed the tokens: out of order, some together, some with others between
# them that committed none; what follows an answer may have been filled in.
STEPS = torch.tensor(
    [[0, 1, 2], [2, 0, 1], [0, 0, 4], [5, 3, 3], [1, 1, 1], [7, 0, -1], [0, -1, -1], [3, 9, 6]]
).int()
# What a run's shape settles.
FITTED = {
    "just_grpo": [f"passes={LENGTH}"], "block_just_grpo": ["passes=2"], "cj_grpo": ["passes=3"],
    "trace_rl": ["merged=2", "passes=2"],
}  # fmt: skip
# Settings that make another loss, with a reference of their own.
VARIANTS = {"ospo": ["tokens=1"]}
SHIPPED = [name for name in BUILT_IN if name in REFERENCES]


def ask(n: int = B, draws: int = 2, length: int = LENGTH, answers: Tensor = ANSWERS) -> Ask:
    ids = torch.arange(n)
    steps = STEPS.repeat(-(-n // B), -(-length // LENGTH))[:n, :length]
    return Ask(
        stream(3, "test"), ids + 10**9, ids, n, length, draws, answers, 5, 2, commit_steps=steps
    )


def for_masks(masks: Masks, asked: Ask) -> Ask:
    """Of a model with blocks of two, whose completions begin at both places of a block."""
    return asked._replace(offsets=asked.indices % 2) if masks.only_blocks else asked


def enumerated(masks: Masks) -> ElboViews:
    """The objective's views with every subset in the place of a random one."""
    views = masks.draw(for_masks(masks, ask()))
    first = torch.stack((SUBSETS, SUBSETS.roll(3, 0)), dim=1)
    if isinstance(masks, OnePass | Quadrature | Prefixes | BlockPrefixes | StepViews):
        return views  # nothing of a whole mask is random; subsets of one size are
    if isinstance(masks, StratifiedBlocks):
        return enumerated_by_block(views, first)
    if isinstance(masks, CoupledViews):
        sides = torch.stack((torch.ones_like(first), first, ~first), dim=2)
        return views._replace(mask_indices=sides)
    if isinstance(masks, Blockwise):
        answered = torch.arange(LENGTH) < ANSWERS[:, None, None]
        some = (first & answered).any(dim=-1, keepdim=True)
        return views._replace(mask_indices=(first | ~some)[:, :, None])
    pair = torch.stack((first, ~first), dim=2)
    counts = pair.sum(dim=-1)
    weights = torch.where(counts > 0, (LENGTH + 1) / (2 * counts.clamp(min=1)), 0.0)
    halves = (views.weights == 0.5).all()
    return ElboViews(pair, torch.full_like(weights, 0.5) if halves else weights)


def enumerated_by_block(views: ElboViews, subsets: Tensor) -> ElboViews:
    """Masks of the answers' tokens, weighted by their block's tokens over those that are masked."""
    places = torch.arange(LENGTH)
    inside = places < ANSWERS[:, None]
    block = (torch.arange(B)[:, None] % 2 + places) // 2
    same = ((block[:, :, None] == block[:, None]) & inside[:, None]).long()
    mask = (subsets & inside[:, None])[:, :, None]
    counts = torch.einsum("bkj,bmvj->bmvk", same, mask.long())
    weights = same.sum(dim=2)[:, None, None] / counts.clamp(min=1)
    whole = mask | ~inside[:, None, None]
    return views._replace(mask_indices=whole, token_weights=weights, predicted=mask)


def tables(views: ElboViews, seed: int) -> Tensor:
    """Log-probabilities of predicted tokens, 0 of others."""
    generator = torch.Generator().manual_seed(seed)
    values = -3 * torch.rand(views.mask_indices.shape, generator=generator, dtype=torch.float64)
    return torch.where(predicted(views), values, 0.0)


def predicted(views: ElboViews) -> Tensor:
    return views.mask_indices if views.predicted is None else views.predicted


def taken(objective: Objective, table: Tensor, views: ElboViews) -> Tensor:
    """A table as the objective takes it."""
    if views.token_weights is not None:
        table = table * views.token_weights.double()
    return combine(-table.flatten(0, 2) if objective.per_token else -table.sum(-1).flatten(),
                   views.weights.double(), objective)  # fmt: skip


def given_of(
    objective: Objective, views: ElboViews, old: Tensor, ref: Tensor | None, espo: EspoConfig
) -> Given:
    answer = torch.arange(LENGTH)[None] < ANSWERS[:, None]
    return Given(
        taken(objective, old, views),
        None if ref is None else taken(objective, ref, views),
        ADVANTAGES,
        ADVANTAGES.view(-1, SIZE).repeat_interleave(SIZE, dim=0),
        answer,
        float(ANSWERS.double().mean()),
        views.mask_indices if objective.per_token else None,
        views.weights.double(),
        LENGTH,
        espo,
        views.predicted if objective.per_token else None,
        None if objective.credit() is None else TOKEN_ADVANTAGES,
    )


def expected(name: str, views: ElboViews, now, fixed, old, ref, espo) -> list[float]:
    """The reference's losses, group by group."""
    losses = []
    for start in range(0, B, SIZE):
        rows = slice(start, start + SIZE)
        group = Group(
            old[rows].tolist(), None if ref is None else ref[rows].tolist(),
            views.mask_indices[rows].tolist(), views.weights[rows].tolist(),
            ADVANTAGES[rows].tolist(), ANSWERS[rows].tolist(), float(ANSWERS.double().mean()),
            LENGTH, espo.clip_eps_low, espo.clip_eps_high, espo.kl_coef, espo.kl_estimator,
            STEPS[rows].tolist(),
            None if views.token_weights is None else views.token_weights[rows].tolist(),
            TOKEN_ADVANTAGES[rows].tolist() if name.startswith("ospo") else None,
        )  # fmt: skip
        lists = now[rows].tolist(), fixed[rows].tolist()
        losses += [REFERENCES[name](*lists, i, group) for i in range(SIZE)]
    return losses


def cases(name: str) -> list[Any]:
    honours = BUILT_IN[name].honours
    kinds = [None]
    if "kl_coef" in honours:
        kinds += ["k1", "k2", "k3"] if "kl_estimator" in honours else ["k2"]
    own = [(name, FITTED.get(name))] + [(f"{name} {v}", [v]) for v in VARIANTS.get(name, ())]
    return [pytest.param(n, v, kind, id=f"{n}-{kind}") for n, v in own for kind in kinds]


@pytest.mark.parametrize(("name", "own", "kl"), [case for name in SHIPPED for case in cases(name)])
def test_loss_and_gradient_are_those_of_the_written_out_objective(name: str, own, kl) -> None:
    espo = EspoConfig(
        objective=name.split()[0], objective_args=own, clip_eps_low=0.2, clip_eps_high=0.3,
        kl_coef=0.07,
    )  # fmt: skip
    espo = replace(espo, kl_estimator=kl or "k2")
    objective = objective_of(espo)
    views = enumerated(objective.masks(espo))
    now, old, ref = (tables(views, seed) for seed in (1, 2, 3))
    # Close enough for some ratios to lie inside the clip range, others below and above.
    old = torch.where(torch.arange(B)[:, None, None, None] % 2 == 0, old, 0.1 * old + 0.9 * now)
    ref = None if kl is None else ref
    given = given_of(objective, views, old, ref, espo)
    leaf = now.clone().requires_grad_()
    found = objective.loss(taken(objective, leaf, views), given)
    losses = expected(name, views, now, now, old, ref, espo)
    assert found.loss.tolist() == pytest.approx(losses, rel=1e-11, abs=1e-12)
    (gradient,) = torch.autograd.grad(found.loss.sum(), leaf)
    step = 1e-6
    for place in predicted(views).nonzero().tolist():
        moved = torch.zeros_like(now)
        moved[tuple(place)] = step
        up, down = (
            sum(expected(name, views, now + s * moved, now, old, ref, espo)) for s in (1, -1)
        )
        slope = (up - down) / (2 * step)
        # A difference of sums of this size is as exact as their last digits.
        exact = max(2e-8, 1e-15 * sum(map(abs, losses)) / step)
        assert gradient[tuple(place)].item() == pytest.approx(slope, rel=1e-6, abs=exact), place
    idle = gradient.flatten(1).abs().sum(dim=1) == 0
    assert found.idle is None or not (found.idle & ~idle).any()
    if objective.idle_without_advantage and ref is None:
        assert idle[ADVANTAGES == 0].all()
    two_pass, again = loss_gradient(objective, taken(objective, now, views), given)
    if objective.each_token_once:
        assert torch.equal(two_pass, torch.where(predicted(views), gradient, 0).sum(dim=2))
    elif objective.per_token:
        assert torch.equal(two_pass, gradient)
    assert torch.equal(again.loss, found.loss) and not again.loss.requires_grad
    assert all(not values.requires_grad for values in found.statistics.values())


def test_every_objective_has_a_reference() -> None:
    assert set(BUILT_IN) == set(SHIPPED)


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_objective_says_what_its_loss_is(name: str) -> None:
    """A linear one's gradient does not depend on the values; the counts are those drawn."""
    espo = EspoConfig(objective=name, num_mc=2, objective_args=FITTED.get(name))
    objective = objective_of(espo)
    masks = objective.masks(espo)
    views = masks.draw(for_masks(masks, ask(draws=num_draws(espo))))
    assert views.weights[0].numel() == views_per_completion(espo)
    assert views.mask_indices.shape == (*views.weights.shape, LENGTH)
    drawn = predicted(views).flatten(2).sum(dim=-1)
    assert not (predicted(views) & ~views.mask_indices).any()
    if masks.fixed:
        # Nobody predicts what was filled in.
        whole = (STEPS >= 0).all(dim=1) if masks.of_steps else ...
        assert (drawn[whole] == masks.masked(LENGTH)).all()
    given = [given_of(objective, views, tables(views, seed), None, espo) for seed in (2, 4)]
    gradients = [
        loss_gradient(objective, taken(objective, tables(views, seed), views), given[0])[0]
        for seed in (5, 6)
    ]
    assert torch.equal(*gradients) == objective.linear or objective.scope == "group"
    old = loss_gradient(objective, taken(objective, tables(views, 5), views), given[1])[0]
    if not objective.compares_with_old:
        assert torch.equal(old, gradients[0])


@pytest.mark.parametrize("name", BUILT_IN)
def test_masks_do_not_depend_on_how_completions_are_split(name: str) -> None:
    fitted = ["passes=8"] if name in ("just_grpo", "cj_grpo", "trace_rl") else FITTED.get(name)
    espo = EspoConfig(objective=name, num_mc=2, objective_args=fitted)
    masks = objective_of(espo).masks(espo)
    whole = for_masks(masks, ask(length=8, answers=2 * ANSWERS + 1))
    views = masks.draw(whole)
    rows = torch.tensor([1, 5, 6])
    part = for_masks(
        masks,
        whole._replace(
            sample_ids=whole.sample_ids[rows],
            indices=rows,
            answers=whole.answers[rows],
            prompt_width=3,
            commit_steps=whole.commit_steps[rows],
        ),
    )
    alone = masks.draw(part)
    assert torch.equal(alone.mask_indices, views.mask_indices[rows])
    assert torch.equal(alone.weights, views.weights[rows])
    for ours, theirs in zip(alone[2:], views[2:], strict=True):  # of tokens
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs[rows])
    prompts, own = masks.prompt_masks(whole), masks.prompt_masks(part)
    assert (prompts is None) == (own is None)
    assert prompts is None or torch.equal(own, prompts[rows][..., :3])


def test_tokens_after_the_end_are_hidden_and_not_predicted() -> None:
    """Blocks of two; the weights of a block's predicted tokens add up to its tokens."""
    masks = StratifiedBlocks()
    asked = for_masks(masks, ask(length=8, answers=2 * ANSWERS + 1))
    views = masks.draw(asked)
    assert views.predicted is not None and views.token_weights is not None
    for row, (offset, end) in enumerate(zip((0, 1) * 4, (2 * ANSWERS + 1).tolist(), strict=True)):
        assert views.mask_indices[row, ..., end:].all()
        assert not views.predicted[row, ..., end:].any()
        weights = torch.where(views.predicted, views.token_weights, 0.0)[row, :, 0]
        for block in range(-(-(offset + end) // 2)):
            places = slice(max(2 * block - offset, 0), min(2 * block - offset + 2, end))
            size = float(places.stop - places.start)
            assert weights[:, places].sum(dim=1).tolist() == [size, size]


def test_coupled_views_mask_each_token_in_two_of_three() -> None:
    views = CoupledViews().draw(ask(4000, 1, 8, torch.full((4000,), 8)))
    everything, one, other = views.mask_indices[:, 0].unbind(1)
    assert everything.all() and (one ^ other).all()
    t = 1 / views.weights[:, 0, 1]
    assert t.min() > 0.2 and t.max() < 0.8
    torch.testing.assert_close(1 / views.weights[:, 0, 2], 1 - t)
    assert abs(float(t.mean()) - 0.5) < 0.02
    assert abs(float((one.double().mean(1) - t).mean())) < 0.02


def test_prompt_masks_have_the_asked_probability() -> None:
    masks = OnePass(0.15).prompt_masks(ask(4000, 2, 4, torch.full((4000,), 4)))
    assert masks is not None and masks.shape == (4000, 2, 1, 5)
    assert abs(float(masks.double().mean()) - 0.15) < 0.01
    assert not torch.equal(masks[:, 0], masks[:, 1])


def test_blockwise_masks_lie_in_one_block_and_after_it() -> None:
    """Blocks of two in an answer of seven of eight tokens: four blocks, the last one of one."""
    n = 2000
    asked = ask(n, 4, 8, torch.full((n,), 7))
    views = Blockwise(0.0).draw(asked)
    assert Blockwise(0.0).prompt_masks(asked) is None
    starts = []
    for mask in views.mask_indices[:, :, 0].flatten(0, 1):
        first = int(mask.nonzero()[0])
        block = first // 2
        assert mask[2 * block + 2 :].all() and mask[:7].any()
        starts.append(block)
    blocks = torch.tensor(starts).view(n, 4)
    assert (blocks.sort(dim=1).values == torch.arange(4)).all(), "draws take different blocks"
    one = views.mask_indices[:, :, 0].flatten(0, 1)[:, :2][blocks.flatten() == 0].sum(dim=1)
    assert abs(float((one == 1).double().mean()) - 0.5) < 0.05


@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
def test_quadrature_is_exact_for_ratios_on_its_grid(nodes: int) -> None:
    """A log-probability that is a polynomial of the mask ratio, on so long a completion."""
    length = 10**6
    grid = Quadrature(nodes)
    counts, weights = grid._grid(length)
    for power in range(2 * nodes):
        per_token = (counts / length) ** power
        estimate = float((weights * counts * per_token).sum()) / length
        assert estimate == pytest.approx(1 / (power + 1), abs=1e-5)
    counts, weights = grid._grid(16)
    assert float((weights * counts).sum()) == pytest.approx(16, rel=1e-6)


def test_a_weight_is_limited_before_the_softmax() -> None:
    """However much likelier a completion has become, beyond the clip nothing changes."""
    espo = EspoConfig(objective="stable_drl", objective_args=("clip=1.2",))
    objective = objective_of(espo)
    views = enumerated(objective.masks(espo))
    now, losses = tables(views, 1), []
    for lower in (0.1, 0.5, 0.9):
        old = now.clone()
        old[0] = torch.where(views.mask_indices[0], now[0] - lower, 0.0)
        given = given_of(objective, views, old, None, espo)
        losses.append(objective.loss(taken(objective, now, views), given).loss)
    assert torch.equal(losses[1], losses[2]) and not torch.equal(losses[0], losses[1])


def test_a_ratio_of_whole_completions_does_not_overflow() -> None:
    """A thousand nats up: the loss of a bad completion is finite, a good one is clipped."""
    espo = EspoConfig(objective="ebpo", kl_coef=0.0)
    objective = objective_of(espo)
    views = enumerated(objective.masks(espo))
    given = given_of(objective, views, tables(views, 1), None, espo)
    logp = (taken(objective, tables(views, 1), views) + 1000.0).float()
    gradient, found = loss_gradient(objective, logp, replace(given, old=given.old.float()))
    assert found.loss.isfinite().all() and gradient.isfinite().all() and not gradient.any()
    good = found.loss[ADVANTAGES > 0]
    torch.testing.assert_close(good, -1.2 * ADVANTAGES[ADVANTAGES > 0].float(), check_dtype=False)


def refused(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_objective(EspoConfig(**settings))
    return str(caught.value)


def test_settings_without_effect_are_refused() -> None:
    assert "--espo-clip-eps-low 0.1" in refused(objective="wd1", clip_eps_low=0.1)
    assert "--espo-kl-coef 0.01" in refused(objective="spg", kl_coef=0.01)
    assert "--espo-elbo-estimator bernoulli" in refused(
        objective="gdsd", elbo_estimator="bernoulli"
    )
    assert "--espo-num-mc 4" in refused(objective="mean_field", num_mc=4)
    assert "k2_unbiased" in refused(objective="token_elbo", kl_estimator="k2_unbiased")
    assert "two_pass" in refused(objective="stable_drl", gradient="joint")
    # The default penalty is no wish for one.
    assert check_objective(EspoConfig(objective="wd1")).kl_coef == 0.0
    assert check_objective(EspoConfig(objective="gdsd")).kl_coef == EspoConfig().kl_coef


def test_groups_are_learnt_from_with_two_passes() -> None:
    assert chosen_gradient(EspoConfig(objective="stable_drl", num_mc=1), 4) == "two_pass"
    assert chosen_gradient(EspoConfig(objective="spg", num_mc=1), 4) == "joint"
    assert chosen_gradient(EspoConfig(objective="coupled_grpo", num_mc=1), 4) == "two_pass"


def test_settings_of_an_objective() -> None:
    assert load_objective("gdsd", ("psi=1",)).psi == 1.0
    assert load_objective("gdpo", ("nodes=4",)).nodes == 4
    for name, settings, part in (
        ("gdsd", ("psi",), "its settings are psi, elbo_weights"),
        ("gdsd", ("phi=1",), "no setting of --espo-objective gdsd"),
        ("espo", ("psi=1",), "it has none"),
        ("gdsd", ("psi=much",), "much is no float"),
        ("gdpo", ("nodes=2.5",), "2.5 is no int"),
        ("gdpo", ("nodes=0",), "nodes=0: must lie in"),
        ("spg", ("beta=nan",), "beta=nan: must lie in"),
        ("wd1", ("prompt_mask=1.5",), r"must lie in \[0, 1\]"),
        ("gdsd", ("psi=inf",), "psi=inf: must lie in"),
        ("grpo", (), "no such objective; use one of espo, token_elbo"),
        ("nothing.at_all", (), "no such objective"),
        ("nowhere.py", (), "no such file"),
        ("math.pi", (), "is no objective"),
    ):
        with pytest.raises(UserError, match=part):
            load_objective(name, settings)


def test_the_arithmetic_of_a_run_knows_the_passes_of_its_objective() -> None:
    dimensions = ModelDimensions(
        num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=2,
        head_dim=4, vocab_size=32,
    )  # fmt: skip
    rollout = RolloutConfig(completion_length=16, block_length=16, denoising_steps=16)

    def flops(name: str, **settings: Any) -> RolloutFlops:
        espo = EspoConfig(objective=name, num_mc=1, updates_per_rollout=3, **settings)
        return rollout_flops(dimensions, 24, espo, rollout)

    def evaluation(views: int, masked: int) -> float:
        n = EspoConfig().completions_per_rollout
        return forward_flops(dimensions, n * views, 24, n * masked)

    for name, views, masked, old in (
        ("espo", 2, 16, 2), ("diffu_grpo", 1, 16, 2), ("coupled_grpo", 3, 32, 2),
        ("rspo", 2, 16, 0), ("gdsd", 2, 16, 2), ("just_grpo", 16, 16, 2), ("cj_grpo", 16, 16, 2),
        ("ebpo", 1, 8.5, 2),
    ):  # fmt: skip
        fitted = load_objective(name).fitted(rollout, 16 if name == "ebpo" else None) or None
        found = flops(name, objective_args=fitted)
        assert found.ref_elbo == pytest.approx(3 * evaluation(views, masked)), name
        assert found.old_elbo == pytest.approx(old * evaluation(views, masked)), name
    alone, two = (flops("wd1", kl_coef=0.0, gradient=way) for way in ("joint", "two_pass"))
    assert alone.ref_elbo == alone.old_elbo == 0.0 and alone.update == two.update


def test_own_advantages(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ranks.py"
    file.write_text("def advantage(rewards):\n    return rewards.argsort(1).argsort(1) - 0.5\n")
    function = load_advantage(str(file))
    assert function(torch.tensor([[3.0, 1.0]])).tolist() == [[0.5, -0.5]]
    (tmp_path / "bad.py").write_text("def mine(rewards):\n    return rewards.mean()\n")
    with pytest.raises(UserError, match="must make a finite tensor of that shape"):
        load_advantage(f"{tmp_path / 'bad.py'}:mine")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="must make a finite tensor of that shape"):
        load_advantage("bad.mine")
    with pytest.raises(UserError, match="no such advantage"):
        load_advantage("bad.other")
