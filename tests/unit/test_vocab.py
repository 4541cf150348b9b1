"""Cross entropy and token draws over a padded, sharded vocabulary, against float64 oracles."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_espo.parallel import cross_entropy as cross_entropy_module
from megatron_espo.parallel import nucleus
from megatron_espo.parallel.nucleus import keep_likeliest
from megatron_espo.parallel.vocab import TokenDraw, _inverse_cdf, cross_entropy, draw_tokens

# (vocabulary, columns): within one block of the running sums, at its edge, across three blocks.
SIZES = [(5, 8), (512, 512), (513, 640), (1300, 1408)]
SMALLEST, LARGEST = 2.0**-53, 1 - 2.0**-53
ALL_SCORES = {"margin": True, "entropy": True}


def random_logits(rows: int, columns: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, columns, generator=generator)


def with_loud_padding(rows: int, vocab_size: int, columns: int, seed: int = 0) -> Tensor:
    """Padded columns that would take all probability if anything read them."""
    logits = random_logits(rows, columns, seed)
    logits[:, vocab_size:] = 50.0
    return logits


def log_probabilities(
    logits: Tensor, vocab_size: int, forbidden: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """float64 log-probabilities: plain, and of the sampled distribution."""
    kept = logits[:, :vocab_size].double()
    allowed = kept.clone()
    allowed[:, forbidden] = float("-inf")
    return kept.log_softmax(-1), (allowed / (temperature or 1.0)).log_softmax(-1)


def uniforms(rows: int, seed: int = 3) -> Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "columns"), SIZES)
def test_cross_entropy_and_its_gradient_know_only_the_real_vocabulary(
    one_rank, vocab_size: int, columns: int, dtype, monkeypatch
) -> None:
    rows = 6
    # Blocks of one row to four, the last one smaller.
    monkeypatch.setattr(cross_entropy_module, "BLOCK_ON_CPU", 4 * 640)
    leaf = with_loud_padding(rows, vocab_size, columns).to(dtype).requires_grad_()
    targets = torch.tensor([0, vocab_size - 1, 1, 2, 3, vocab_size // 2])
    loss = cross_entropy(leaf.clone(), targets, vocab_size, one_rank)
    slopes = random_logits(1, rows, seed=1)[0]
    (gradient,) = torch.autograd.grad(loss @ slopes, leaf)

    log_p = leaf.detach()[:, :vocab_size].double().log_softmax(-1)
    assert loss.dtype == torch.float32
    expected = -log_p[torch.arange(rows), targets]
    assert torch.allclose(loss.double(), expected, rtol=1e-6, atol=1e-6)
    softmax = log_p.exp()
    softmax[torch.arange(rows), targets] -= 1.0
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert torch.allclose(
        gradient[:, :vocab_size].double(), softmax * slopes[:, None], rtol=tolerance, atol=1e-7
    )
    assert (gradient[:, vocab_size:] == 0).all()


@pytest.mark.parametrize(("vocab_size", "columns"), SIZES)
def test_greedy_takes_the_most_likely_token_but_never_the_forbidden_one(
    one_rank, vocab_size: int, columns: int
) -> None:
    logits = with_loud_padding(40, vocab_size, columns)
    forbidden = 2
    logits[:20, forbidden] = 40.0
    # Greedy sampling does not look at the uniform numbers.
    nothing = torch.full((40,), float("nan"), dtype=torch.float64)
    draw = draw_tokens(logits.clone(), nothing, 0.0, vocab_size, forbidden, one_rank)
    plain, tempered = log_probabilities(logits, vocab_size, forbidden, 0.0)
    assert torch.equal(draw.tokens, tempered.argmax(-1))
    assert (draw.tokens != forbidden).all()
    confidence = plain.gather(1, draw.tokens[:, None])[:, 0]
    assert torch.allclose(draw.log_confidence.double(), confidence, atol=1e-5)
    # Where the forbidden token holds nearly all probability, the chosen one has little.
    assert draw.log_confidence[:20].max() < -25.0 < draw.log_tempered.min()


@pytest.mark.parametrize("temperature", [0.0, 0.25, 1.0, 1.7])
@pytest.mark.parametrize(("vocab_size", "columns"), SIZES)
def test_scores_are_those_of_the_plain_and_of_the_sampled_distribution(
    one_rank, vocab_size: int, columns: int, temperature: float
) -> None:
    logits = with_loud_padding(50, vocab_size, columns)
    forbidden = vocab_size - 2
    draw = draw_tokens(
        logits.clone(), uniforms(50), temperature, vocab_size, forbidden, one_rank, **ALL_SCORES
    )
    plain, tempered = log_probabilities(logits, vocab_size, forbidden, temperature)
    chosen = draw.tokens[:, None]
    top = tempered.exp().topk(2, dim=-1).values
    allowed = torch.cat((tempered[:, :forbidden], tempered[:, forbidden + 1 :]), dim=1)
    expected = TokenDraw(
        tokens=draw.tokens,
        log_confidence=plain.gather(1, chosen)[:, 0],
        log_tempered=tempered.gather(1, chosen)[:, 0],
        margin=top[:, 0] - top[:, 1],
        negative_entropy=(allowed.exp() * allowed).sum(-1),
    )
    for name, want in expected._asdict().items():
        found = getattr(draw, name).double()
        assert torch.allclose(found, want.double(), rtol=1e-5, atol=1e-5), name
    assert draw.tokens.dtype == torch.int64
    assert {found.dtype for found in draw[1:]} == {torch.float32}


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_scores_that_are_not_asked_for_change_nothing(one_rank, temperature: float) -> None:
    logits = with_loud_padding(50, 1300, 1408)

    def draw(**scores: bool) -> TokenDraw:
        return draw_tokens(logits.clone(), uniforms(50), temperature, 1300, 3, one_rank, **scores)

    bare, whole = draw(), draw(**ALL_SCORES)
    assert bare.margin is None and bare.negative_entropy is None
    assert all(torch.equal(a, b) for a, b in zip(bare[:3], whole[:3], strict=True))
    assert torch.equal(draw(margin=True).margin, whole.margin)
    assert torch.equal(draw(entropy=True).negative_entropy, whole.negative_entropy)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@pytest.mark.parametrize(("vocab_size", "columns"), SIZES)
def test_a_token_is_drawn_exactly_for_the_numbers_of_its_interval(
    one_rank, vocab_size: int, columns: int, temperature: float
) -> None:
    row = with_loud_padding(1, vocab_size, columns, seed=4) / 2
    forbidden = vocab_size // 3
    p = log_probabilities(row, vocab_size, forbidden, temperature)[1][0].exp()
    upper = p.cumsum(0)
    # Weights are float32; a boundary is right to 1e-7 of the whole.
    wide = p > 3e-7
    tokens = torch.arange(vocab_size)[wide]
    assert tokens.numel() > 0.9 * (vocab_size - 1)
    low, high = (upper - p)[wide] + 1e-7, upper[wide] - 1e-7
    for place in (low, (low + high) / 2, high):
        draw = draw_tokens(
            row.repeat(len(tokens), 1), place, temperature, vocab_size, forbidden, one_rank
        )
        assert torch.equal(draw.tokens, tokens)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize(("vocab_size", "columns"), SIZES)
def test_ends_of_the_unit_interval_give_the_first_and_last_possible_token(
    one_rank, vocab_size: int, columns: int, temperature: float
) -> None:
    ends = torch.tensor([SMALLEST, LARGEST], dtype=torch.float64).repeat(10)
    for forbidden in (0, 1, vocab_size - 1):
        logits = with_loud_padding(20, vocab_size, columns) / 10
        # Neither an impossible token nor the forbidden one can come out, in front or behind.
        logits[10:, 0] = logits[10:, vocab_size - 1] = -1e4
        tokens = draw_tokens(logits, ends, temperature, vocab_size, forbidden, one_rank).tokens
        for row, token in enumerate(tokens.tolist()):
            possible = [
                t
                for t in range(vocab_size)
                if t != forbidden and not (row >= 10 and t in (0, vocab_size - 1))
            ]
            assert token == (possible[0] if row % 2 == 0 else possible[-1])


@pytest.mark.parametrize("columns", [6, 512, 1300])
def test_fractions_at_and_beyond_the_ends_give_the_outermost_tokens_with_weight(columns) -> None:
    # What rounding between the shards may ask for; tokens without weight lie outside and between.
    first, last = columns // 4, columns - 2
    weights = torch.zeros(4, columns)
    weights[:, first] = weights[:, last] = 0.3
    fractions = torch.tensor([-1e-16, 0.0, 1.0, 1.0 + 1e-15], dtype=torch.float64)
    assert _inverse_cdf(weights, fractions).tolist() == [first, first, last, last]
    # The upper end of one interval is the lower end of the next.
    middle = torch.tensor([0.5 - 1e-12, 0.5, 0.5, 0.5 + 1e-12], dtype=torch.float64)
    assert _inverse_cdf(weights, middle).tolist() == [first, last, last, last]


def test_a_single_possible_token_is_always_drawn(one_rank) -> None:
    numbers = torch.tensor([SMALLEST, 0.3, LARGEST], dtype=torch.float64)
    for only in (0, 511, 512, 1299):
        logits = torch.full((3, 1408), -1e4)
        logits[:, only] = 3.0
        logits[:, 700] = 90.0
        draw = draw_tokens(logits, numbers, 1.0, 1300, 700, one_rank, **ALL_SCORES)
        assert draw.tokens.tolist() == [only] * 3
        assert draw.log_tempered.tolist() == draw.negative_entropy.tolist() == [0.0] * 3
        assert draw.margin.tolist() == [1.0] * 3
        assert draw.log_confidence.tolist() == pytest.approx([-87.0] * 3, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_drawn_tokens_follow_the_tempered_distribution(one_rank, temperature: float) -> None:
    n, vocab_size, forbidden = 8_000, 20, 7
    row = with_loud_padding(1, vocab_size, 24, seed=5) / 2
    tokens = draw_tokens(
        row.repeat(n, 1), uniforms(n), temperature, vocab_size, forbidden, one_rank
    ).tokens
    counts = tokens.bincount(minlength=24)
    assert (counts[vocab_size:] == 0).all() and counts[forbidden] == 0
    expected = n * log_probabilities(row, vocab_size, forbidden, temperature)[1][0].exp()
    statistic = 0.0
    for token in range(vocab_size):
        if token != forbidden:
            statistic += float((counts[token] - expected[token]) ** 2 / expected[token])
    # 18 degrees of freedom: the quantile of 1 - 3e-5.
    assert statistic < 51.0
    # The other temperatures would be told apart.
    for other in {0.7, 1.0, 1.3} - {temperature}:
        wrong = n * log_probabilities(row, vocab_size, forbidden, other)[1][0].exp()
        wrong, seen = (torch.cat((c[:forbidden], c[forbidden + 1 : 20])) for c in (wrong, counts))
        assert ((seen - wrong) ** 2 / wrong).sum() > 100.0


# No share of equal tokens is just one of these, which rounding would put on either side.
LIMITS = [(0.93, 0), (0.33, 0), (1e-9, 0), (1.0, 1), (1.0, 7), (0.83, 5), (0.43, 600), (1.0, 5000)]


def likeliest(tempered: Tensor, top_p: float, top_k: int) -> Tensor:
    """float64 log-probabilities of the sampled distribution after top-k and top-p, by sorting."""
    # The most likely first, of equals the smallest id.
    values, order = tempered.sort(dim=-1, descending=True, stable=True)
    before = values.exp().cumsum(-1) - values.exp()
    kept = torch.ones_like(before, dtype=torch.bool)
    if top_p < 1.0:
        kept &= before < top_p
        kept[:, 0] = True
    if top_k:
        kept[:, top_k:] = False
    kept &= values > float("-inf")
    dropped = torch.empty_like(kept).scatter(1, order, ~kept)
    return tempered.masked_fill(dropped, float("-inf")).log_softmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize(("top_p", "top_k"), LIMITS)
@pytest.mark.parametrize(
    ("vocab_size", "widths"), [(1300, [1408]), (1300, [704] * 2), (1030, [512] * 3), (11, [4] * 3)]
)
def test_tokens_come_from_the_likeliest_by_an_oracle_that_sorts(
    one_rank, on_shards, vocab_size: int, widths: list[int], top_p: float, top_k: int, temperature
) -> None:
    n, forbidden = 60, 9
    logits = with_loud_padding(n, vocab_size, sum(widths))
    logits[:5] = logits[:5].bfloat16().float()  # many tokens with equal logits, as in training
    logits[5:8] = 0.25
    logits[8, : vocab_size // 2] = -300.0  # their weights are 0 in float32
    numbers = uniforms(n)
    plain, tempered = log_probabilities(logits, vocab_size, forbidden, temperature)
    sampled = likeliest(tempered, top_p, top_k)

    def work(part: Tensor, group: Any) -> TokenDraw:
        return draw_tokens(
            part.clone(), numbers, temperature, vocab_size, forbidden, group,
            top_p=top_p, top_k=top_k, **ALL_SCORES,
        )  # fmt: skip

    draws = [work(logits, one_rank)]
    if len(widths) > 1:
        draws += on_shards(logits.split(widths, dim=1), work)
    distance = (sampled.exp().cumsum(1) - numbers[:, None]).abs().amin(1)
    clear = distance > 1e-6
    chosen = (sampled.exp().cumsum(1) <= numbers[:, None]).sum(1).clamp(max=vocab_size - 1)
    assert clear.float().mean() > 0.9
    top = sampled.exp().topk(2, dim=-1).values
    expected = TokenDraw(
        tokens=chosen,
        log_confidence=plain.gather(1, chosen[:, None])[:, 0],
        log_tempered=sampled.gather(1, chosen[:, None])[:, 0],
        margin=top[:, 0] - top[:, 1],
        negative_entropy=(sampled.exp() * sampled.clamp(min=-1e9)).sum(-1),
    )
    for draw in draws:
        assert torch.equal(draw.tokens[clear], expected.tokens[clear])
        for name in TokenDraw._fields[1:]:
            found, want = getattr(draw, name).double()[clear], getattr(expected, name)[clear]
            assert torch.allclose(found, want, rtol=1e-4, atol=1e-4), name
    for draw in draws[2:]:
        assert all(torch.equal(a, b) for a, b in zip(draw, draws[1], strict=True))
    if top_k == 1:
        assert torch.equal(draws[0].tokens, tempered.argmax(-1))  # the greedy token, and its ties


def test_kept_tokens_are_found_for_logits_of_any_size(one_rank) -> None:
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 4
    for values in ([0.0, -0.0, tiny, -tiny], [huge, -huge, 0.0, 1.0], [-3e-44, 3e-44, 0.0, -1.0]):
        logits = torch.tensor([values])
        for count in (1, 2, 3):
            kept = logits.clone()
            keep_likeliest(kept, 1.0, 1.0, count, one_rank)
            order = sorted(range(4), key=lambda i: (-values[i], i))[:count]
            assert sorted((kept[0] > -torch.inf).nonzero()[:, 0].tolist()) == sorted(order)


def test_a_set_of_just_the_probability_is_enough(one_rank) -> None:
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log2() * torch.tensor(2.0).log()
    for top_p, count in ((0.5, 1), (0.75, 2), (0.76, 3), (0.875, 3), (0.9, 4)):
        kept = logits.clone()
        keep_likeliest(kept, 1.0, top_p, 0, one_rank)
        assert (kept > -torch.inf).sum() == count, top_p


def test_rows_that_are_cut_into_parts_keep_the_same_tokens(one_rank, monkeypatch) -> None:
    logits = random_logits(50, 300)
    whole, parts = logits.clone(), logits.clone()
    keep_likeliest(whole, 0.8, 0.7, 40, one_rank)
    monkeypatch.setattr(nucleus, "_ENTRIES", 2000)
    keep_likeliest(parts, 0.8, 0.7, 40, one_rank)
    assert torch.equal(whole, parts) and whole.isinf().any()


@pytest.mark.parametrize(("top_p", "top_k"), [(0.8, 0), (1.0, 40), (0.7, 40)])
def test_shards_keep_the_very_tokens_of_a_whole_vocabulary(
    one_rank, on_shards, top_p: float, top_k: int
) -> None:
    """Also where float sums of the shards would not be the whole's: tokens of equal logits."""
    logits = (random_logits(200, 96) * 2).round() / 2
    whole, widths = logits.clone(), [7, 40, 49]
    keep_likeliest(whole, 0.7, top_p, top_k, one_rank)

    def work(part: Tensor, group: Any) -> Tensor:
        kept = part.clone()
        keep_likeliest(kept, 0.7, top_p, top_k, group)
        return kept

    assert torch.equal(torch.cat(on_shards(logits.split(widths, dim=1), work), 1), whole)
    probabilities = (logits.double() / 0.7).softmax(-1)
    kept = whole > -torch.inf
    smallest = probabilities.masked_fill(~kept, 2.0).amin(-1, keepdim=True)
    held = (probabilities * kept).sum(-1, keepdim=True)
    assert (probabilities * ~kept <= smallest).all()
    enough, numbers = (held >= top_p - 1e-9), kept.sum(-1, keepdim=True)
    if top_k:
        assert (numbers <= top_k).all() and (enough | (numbers == top_k)).all()
    else:
        assert enough.all()
    # One token fewer would be too little.
    assert ((held - smallest < top_p + 1e-9) | (numbers == 1)).all()


@pytest.mark.parametrize("num_shards", [2, 3])
def test_cross_entropy_does_not_depend_on_the_shards(num_shards: int, on_shards) -> None:
    # Width 12: with a vocabulary of 5 the second of two shards, or the last two, hold padding.
    for vocab_size in (12, 11, 5):
        logits = with_loud_padding(4, vocab_size, 12)
        targets = torch.tensor([0, 4, 2, vocab_size - 1])
        slopes = torch.tensor([1.0, -2.0, 0.5, 3.0])

        def work(
            part: Tensor,
            group: Any,
            targets: Tensor = targets,
            slopes: Tensor = slopes,
            vocab_size: int = vocab_size,
        ) -> tuple[Tensor, Tensor]:
            leaf = part.clone().requires_grad_()
            loss = cross_entropy(leaf.clone(), targets, vocab_size, group)
            return loss.detach(), torch.autograd.grad(loss @ slopes, leaf)[0]

        parts = [part.contiguous() for part in logits.chunk(num_shards, dim=1)]
        results = on_shards(parts, work)
        log_p = logits[:, :vocab_size].double().log_softmax(-1)
        expected = torch.zeros(4, 12, dtype=torch.float64)
        expected[:, :vocab_size] = log_p.exp()
        expected[torch.arange(4), targets] -= 1.0
        for loss, _ in results:
            assert torch.allclose(loss.double(), -log_p[torch.arange(4), targets], atol=1e-6)
        gradient = torch.cat([part for _, part in results], dim=1)
        assert torch.allclose(gradient.double(), expected * slopes[:, None], atol=1e-6)
        assert (gradient[:, vocab_size:] == 0).all()


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
@pytest.mark.parametrize(
    ("vocab_size", "widths"),
    [(1300, [704] * 2), (1300, [352] * 4), (1030, [512] * 3), (11, [4] * 3)],
)
def test_draws_do_not_depend_on_the_shards(
    one_rank, on_shards, vocab_size: int, widths: list[int], temperature: float
) -> None:
    n, forbidden = 400, 9
    logits = with_loud_padding(n, vocab_size, sum(widths))
    numbers = uniforms(n)
    tempered = log_probabilities(logits, vocab_size, forbidden, temperature)[1]
    if temperature:
        # A number closer to a boundary than float32 weights resolve belongs to either side.
        distance = (tempered.exp().cumsum(1) - numbers[:, None]).abs().amin(1)
        clear = distance > 1e-6
        expected = (tempered.exp().cumsum(1) <= numbers[:, None]).sum(1)
    else:
        clear, expected = torch.ones(n, dtype=torch.bool), tempered.argmax(1)
    assert clear.float().mean() > 0.97

    def work(part: Tensor, group: Any) -> TokenDraw:
        return draw_tokens(
            part.clone(), numbers, temperature, vocab_size, forbidden, group, **ALL_SCORES
        )

    whole = work(logits, one_rank)
    shards = on_shards(logits.split(widths, dim=1), work)
    for draw in (whole, *shards):
        assert torch.equal(draw.tokens[clear], expected[clear])
        for name in TokenDraw._fields[1:]:
            mine, theirs = getattr(draw, name)[clear], getattr(whole, name)[clear]
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4), name
    # Whatever rounding does, the ranks of one group always agree to the last bit.
    for draw in shards[1:]:
        assert all(torch.equal(a, b) for a, b in zip(draw, shards[0], strict=True))
