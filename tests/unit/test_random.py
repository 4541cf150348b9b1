"""Counter-based draws: known answers, rows of their own, and no global state."""

import random

import numpy as np
import pytest
import torch

import megatron_espo.random as counter_random
from megatron_espo.random import Stream, permutation, philox, randint, stream, substream, uniform

KEY = stream(7, "test")
ONES = 0xFFFFFFFF


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def chi_square(counts: torch.Tensor, expected: float | torch.Tensor) -> tuple[float, float]:
    """The statistic, and what a true uniform exceeds once in 30,000 seeds (Wilson-Hilferty)."""
    df = counts.numel() - 1
    limit = df * (1 - 2 / (9 * df) + 4 * (2 / (9 * df)) ** 0.5) ** 3
    return float(((counts - expected) ** 2 / expected).sum()), limit


def python_philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox-4x32-10 with Python's integers, from the paper's definition."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (product1 >> 32) ^ c[1] ^ k0,
            product1 & ONES,
            (product0 >> 32) ^ c[3] ^ k1,
            product0 & ONES,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, answer) -> None:
    assert philox(torch.tensor(counter), Stream(*key)).tolist() == list(answer)
    assert python_philox(counter, key) == list(answer)


def test_uniforms_are_52_bits_of_the_words_of_position_and_sample_id() -> None:
    for sample_id in (0, 5, 2**32 - 1, 2**32, 3 * 2**40 + 17, 2**62):
        expected = []
        for position in range(3):
            words = python_philox((position, 0, sample_id & ONES, sample_id >> 32), KEY)
            for high, low in (words[:2], words[2:]):
                cell = (high >> 6 << 26) | (low >> 6)
                expected.append((2 * cell + 1) / 2**53)
        row = uniform(KEY, ids(sample_id), 6)
        assert row.dtype == torch.float64
        assert row.tolist() == [expected]


def test_a_row_depends_on_its_own_sample_id_alone() -> None:
    together = uniform(KEY, ids(3, 2**33, 0, 3), 9)
    for row, sample_id in zip(together, (3, 2**33, 0, 3), strict=True):
        assert torch.equal(row, uniform(KEY, ids(sample_id), 9)[0])
    assert torch.equal(uniform(KEY, ids(0, 3, 2**33, 3), 9), together[[2, 0, 1, 3]])
    whole = randint(KEY, ids(0, 1, 2), 5, -3, 9)
    assert torch.equal(torch.cat([randint(KEY, ids(i), 5, -3, 9) for i in range(3)]), whole)


def test_a_longer_row_starts_with_the_shorter_one() -> None:
    longest = uniform(KEY, ids(1, 8), 12)
    for count in range(12):
        assert torch.equal(uniform(KEY, ids(1, 8), count), longest[:, :count])


def test_sample_ids_above_32_bits_have_rows_of_their_own() -> None:
    rows = uniform(KEY, ids(*(5 + (high << 32) for high in (0, 1, 2, 2**20))), 4)
    assert rows.unique().numel() == rows.numel()


@pytest.mark.parametrize(("word", "number"), [(0, 2.0**-53), (ONES, 1 - 2.0**-53)])
def test_neither_0_nor_1_can_come_out(word, number, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        counter_random, "philox", lambda counter, key: torch.full_like(counter, word)
    )
    row = uniform(KEY, ids(0), 4)
    assert row.tolist() == [[number] * 4]
    assert 0.0 < row.min() <= row.max() < 1.0


def test_families_with_different_names_share_no_key() -> None:
    keys = [
        stream(seed, purpose, *indices)
        for seed in (0, 1, 11)
        for purpose in ("elbo", "token", "elbo-mask")
        for indices in ((), (0,), (1,), (1, 1), (11,), (0, 1), (1, 0))
    ]
    keys += [
        substream(key, purpose, index)
        for key in keys[:9]
        for purpose in ("mask", "count")
        for index in (0, 1, 10)
    ]
    assert len(set(keys)) == len(keys)
    rows = torch.cat([uniform(key, ids(0), 4) for key in keys])
    assert rows.unique().numel() == rows.numel()
    assert all(0 <= word <= ONES for key in keys for word in key)


def test_a_name_with_a_separator_is_not_a_name_with_an_index() -> None:
    keys = [stream(2, "a/1", 2), stream(2, "a", 1, 2), stream(2, "a'/1", 2), stream(2, "a'", 1, 2)]
    keys += [substream(KEY, "a/1", 2), substream(KEY, "a", 1), substream(KEY, "a'/1", 2)]
    assert len(set(keys)) == len(keys)


def test_a_key_is_the_same_on_every_machine() -> None:
    # Pinned: another hash would give a resumed run other masks and tokens.
    assert stream(1234, "elbo", 3, 1) == Stream(1310094242, 1677872802)
    assert substream(Stream(1, 2), "mask", 3) == Stream(2476062293, 3034046934)


def test_draws_neither_read_nor_move_the_global_generators() -> None:
    def draw() -> list[torch.Tensor]:
        return [uniform(KEY, ids(0, 9), 5), randint(KEY, ids(1), 5, 0, 99), permutation(KEY, 50)]

    def states() -> list[str]:
        return [
            str(torch.get_rng_state().tolist()),
            str(
                [
                    part.tolist() if hasattr(part, "tolist") else part
                    for part in np.random.get_state(legacy=True)
                ]
            ),
            str(random.getstate()),
        ]

    results = []
    for seed in (0, 12345):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = states()
        results.append(draw())
        assert states() == before
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_permutation_is_a_permutation() -> None:
    for length in (0, 1, 2, 17, 1000):
        assert permutation(stream(3, "order"), length).sort().values.tolist() == list(range(length))
    assert permutation(stream(3, "order"), 17).tolist() != list(range(17))


def test_permutations_are_uniform() -> None:
    orders = [tuple(permutation(stream(5, "order", i), 3).tolist()) for i in range(300)]
    names = sorted(set(orders))
    assert len(names) == 6
    statistic, limit = chi_square(torch.tensor([orders.count(name) for name in names]), 50)
    assert statistic < limit


@pytest.mark.parametrize("along", ["row", "column"])
def test_uniforms_are_uniform_and_neighbours_independent(along: str) -> None:
    numbers = uniform(stream(11, "chi"), torch.arange(256), 256)
    numbers = numbers if along == "row" else numbers.T
    counts = torch.histc(numbers, bins=64, min=0.0, max=1.0)
    statistic, limit = chi_square(counts, numbers.numel() / 64)
    assert statistic < limit
    cells = (numbers * 8).long()
    # Non-overlapping neighbours along the row, and across rows for the other parametrisation.
    pairs = (cells[:, 0::2] * 8 + cells[:, 1::2]).flatten().bincount(minlength=64)
    statistic, limit = chi_square(pairs, numbers.numel() / 128)
    assert statistic < limit


def test_low_bits_are_uniform() -> None:
    cells = (uniform(stream(12, "bits"), torch.arange(64), 256) * 2.0**52).long() & 63
    statistic, limit = chi_square(cells.flatten().bincount(minlength=64), cells.numel() / 64)
    assert statistic < limit


def test_randint_is_uniform_over_both_ends_included() -> None:
    numbers = randint(stream(13, "randint"), torch.arange(500), 20, -2, 4)
    assert (numbers.min(), numbers.max()) == (-2, 4)
    statistic, limit = chi_square((numbers + 2).flatten().bincount(), numbers.numel() / 7)
    assert statistic < limit
    assert randint(KEY, ids(0), 3, 6, 6).tolist() == [[6, 6, 6]]


def test_randint_stays_in_range_at_the_ends_of_the_unit_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = torch.tensor([[2.0**-53, 1 - 2.0**-53]], dtype=torch.float64)
    monkeypatch.setattr(counter_random, "uniform", lambda key, sample_ids, count: ends)
    # Spans on both sides of what float64 holds exactly.
    for high in (0, 1, 9, 2**53 - 1, 2**60):
        low_end, high_end = randint(KEY, ids(0), 2, 0, high)[0].tolist()
        assert low_end <= high * 2.0**-52
        assert high * (1 - 2.0**-52) <= high_end <= high


def test_a_row_can_start_at_any_even_place_of_its_numbers() -> None:
    key, ids, starts = stream(1, "test"), torch.tensor([4, 9, 2**40]), (0, 6, 12)
    whole = uniform(key, ids, 20)
    for count in (1, 4, 5):
        part = uniform(key, ids, count, torch.tensor(starts))
        expected = [whole[i, start : start + count] for i, start in enumerate(starts)]
        assert torch.equal(part, torch.stack(expected))
