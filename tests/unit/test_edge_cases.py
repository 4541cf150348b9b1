"""Edges of sampling and of the objective: empty shards, ties, clip ranges of 0, peaked rows."""

import pytest
import torch
from espo_terms import elbo_gradient

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.parallel.vocab import draw_tokens


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0.0, 0.3), (0.2, 0.0)])
def test_first_update_passes_the_whole_gradient_for_a_clip_range_of_0(low, high) -> None:
    config = EspoConfig(clip_eps_low=low, clip_eps_high=high)
    elbo = torch.tensor([[-20.0, -21.0], [-5.0, -7.5]])
    gradient, terms = elbo_gradient(elbo, elbo.clone(), None, torch.tensor([1.0, -2.0]), 8, config)
    assert (terms.ratio == 1.0).all()
    assert gradient.tolist() == [[-1 / 16] * 2, [2 / 16] * 2]


@pytest.mark.parametrize("columns", [8, 300, 640, 1408])
def test_greedy_ties_go_to_the_smallest_token_id(one_rank, columns) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (64, columns), generator=generator).float()
    uniforms = torch.full((64,), 0.5, dtype=torch.float64)
    tokens = draw_tokens(logits.clone(), uniforms, 0.0, columns, 0, one_rank).tokens
    logits[:, 0] = float("-inf")
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert tokens.tolist() == expected


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(("vocab_size", "forbidden"), [(5, 2), (8, 3), (9, 8)])
def test_a_shard_without_any_allowed_token_takes_part_in_sampling(
    one_rank, on_shards, vocab_size, forbidden, temperature
) -> None:
    logits = torch.randn(100, 12, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniforms[:2] = torch.tensor([2.0**-53, 1 - 2.0**-53])

    def work(part, group):
        return draw_tokens(part.clone(), uniforms, temperature, vocab_size, forbidden, group)

    whole = work(logits, one_rank)
    for draw in on_shards(logits.split([4, 4, 4], dim=1), work):
        assert torch.equal(draw.tokens, whole.tokens)


def test_the_largest_number_never_gives_a_padded_token(on_shards) -> None:
    largest = torch.full((5,), 1 - 2.0**-53, dtype=torch.float64)
    for seed in range(10):
        logits = torch.randn(5, 1536, generator=torch.Generator().manual_seed(seed))
        draws = on_shards(
            logits.split([512] * 3, dim=1),
            lambda part, group: draw_tokens(part.clone(), largest, 1.0, 1000, 3, group),
        )
        assert (draws[0].tokens < 1000).all()


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_entropy_is_precise_at_the_size_of_real_logits(one_rank, temperature, shift) -> None:
    logits = 6.0 * torch.randn(20, 32000, generator=torch.Generator().manual_seed(0)) + shift
    uniforms = torch.full((20,), 0.5, dtype=torch.float64)
    draw = draw_tokens(logits.clone(), uniforms, temperature, 32000, 0, one_rank, entropy=True)
    log_p = (logits[:, 1:].double() / temperature).log_softmax(-1)
    expected = (log_p.exp() * log_p).sum(-1)
    assert torch.allclose(draw.negative_entropy.double(), expected, rtol=1e-4, atol=2e-5)
    assert (draw.negative_entropy <= 1e-6).all()


@pytest.mark.parametrize("block_length", [0, -32])
def test_block_length_below_1_is_refused_by_name(block_length) -> None:
    with pytest.raises(ValueError, match="--rollout-block-length"):
        RolloutConfig(block_length=block_length).validate()
