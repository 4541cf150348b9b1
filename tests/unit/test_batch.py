"""Micro-batches of noised views: each view once, each masked position where it belongs."""

import pytest
import torch

from megatron_espo.diffusion.noise import ElboViews, elbo_views
from megatron_espo.model.head import masked_cross_entropy
from megatron_espo.passes.batch import (
    Sequences,
    fill_up,
    mask_rows,
    pack_sequences,
    view_batches,
)
from megatron_espo.passes.shapes import Shapes
from megatron_espo.random import stream

MASK, PAD, VOCAB = 99, 98, 97
LENGTH = 5


def sequences() -> Sequences:
    """Four sequences in which every token of prompt and completion is different."""
    prompts = [[0, 1, 2], [3], [4, 5, 6, 7, 8, 9], [10, 11]]
    completions = 20 + torch.arange(4 * LENGTH).view(4, LENGTH)
    return pack_sequences(prompts, completions, PAD, Shapes(4))


def views(num_mc: int = 2) -> ElboViews:
    ids = torch.arange(4)
    return elbo_views("coupled", stream(3, "test-batch"), ids, ids, 4, LENGTH, num_mc)


def test_packing_puts_prompt_completion_and_padding_side_by_side() -> None:
    packed = sequences()
    assert packed.tokens.dtype == torch.int64
    assert packed.tokens.tolist() == [
        [0, 1, 2, 20, 21, 22, 23, 24, PAD, PAD, PAD, PAD],
        [3, 25, 26, 27, 28, 29, PAD, PAD, PAD, PAD, PAD, PAD],
        [4, 5, 6, 7, 8, 9, 30, 31, 32, 33, 34, PAD],
        [10, 11, 35, 36, 37, 38, 39, PAD, PAD, PAD, PAD, PAD],
    ]
    assert packed.prompt_lengths.tolist() == [3, 1, 6, 2]
    assert (packed.completion_length, len(packed)) == (LENGTH, 4)


@pytest.mark.parametrize(("multiple", "width"), [(1, 8), (2, 8), (3, 9), (16, 16)])
def test_width_is_the_least_multiple_that_holds_the_longest_row(multiple: int, width: int) -> None:
    packed = pack_sequences(
        [[1], [1, 2, 3]], torch.zeros(2, 5, dtype=torch.int64), PAD, Shapes(multiple)
    )
    assert packed.tokens.shape == (2, width)


def test_packing_refuses_prompts_and_completions_of_different_number() -> None:
    with pytest.raises(ValueError, match="zip"):
        pack_sequences([[1], [2], [3]], torch.zeros(2, 5, dtype=torch.int64), PAD, Shapes())


@pytest.mark.parametrize("rows_per_batch", [1, 2, 4, 8, 16])
def test_every_view_is_cut_once_with_its_weight_the_longest_sequences_first(
    rows_per_batch: int,
) -> None:
    drawn = views()
    batches = view_batches(sequences(), drawn, MASK, VOCAB, rows_per_batch, same_width=False)
    # Prompts of 3, 1, 6 and 2 tokens; the four views of a sequence stay together.
    order = [4 * i + view for i in (2, 0, 3, 1) for view in range(4)]
    assert torch.cat([batch.view_index for batch in batches]).tolist() == order
    assert torch.equal(torch.cat([b.weights for b in batches]), drawn.weights.flatten()[order])
    assert {batch.batch.tokens.size(0) for batch in batches} == {rows_per_batch}


@pytest.mark.parametrize(("rows_per_batch", "widths"), [(4, [12, 8, 8, 8]), (8, [12, 8])])
def test_a_micro_batch_is_as_wide_as_its_longest_row(rows_per_batch: int, widths: list) -> None:
    """Eleven, eight, seven and six positions, in multiples of four."""
    for same, expected in ((False, widths), (True, [12] * len(widths))):
        batches = view_batches(sequences(), views(), MASK, VOCAB, rows_per_batch, same_width=same)
        assert [view.batch.tokens.size(1) for view in batches] == expected


def test_chosen_sequences_are_cut_as_if_they_were_alone() -> None:
    every = view_batches(sequences(), views(), MASK, VOCAB, 4, same_width=False)
    chosen = torch.tensor([0, 3])
    for same, width in ((False, None), (True, 8)):
        some = view_batches(sequences(), views(), MASK, VOCAB, 4, same_width=same, chosen=chosen)
        assert len(some) == 2
        for ours, theirs in zip(some, every[1:3], strict=True):
            assert torch.equal(ours.view_index, theirs.view_index)
            assert torch.equal(ours.weights, theirs.weights)
            assert torch.equal(ours.batch.positions, theirs.batch.positions)
            assert width is None or ours.batch.tokens.size(1) == width


@pytest.mark.parametrize(
    ("needed", "multiple", "chosen"),
    [
        ([0, 0, 0, 0], 1, [0, 1, 0, 0]),  # one in any case: the shortest
        ([0, 1, 1, 0], 1, [0, 1, 1, 0]),
        ([1, 0, 0, 0], 2, [1, 1, 0, 0]),
        ([1, 1, 0, 1], 2, [1, 1, 1, 1]),
        ([0, 0, 1, 0], 4, [1, 1, 1, 1]),
    ],
)
def test_micro_batches_are_filled_up_with_the_shortest_others(
    needed: list[int], multiple: int, chosen: list[int]
) -> None:
    lengths = torch.tensor([7, 5, 9, 6])
    assert fill_up(torch.tensor(needed).bool(), lengths, multiple).int().tolist() == chosen


def test_views_that_do_not_fill_the_micro_batches_are_refused() -> None:
    with pytest.raises(AssertionError):
        view_batches(sequences(), views(), MASK, VOCAB, 3, same_width=False)


@pytest.mark.parametrize("rows_per_batch", [1, 2, 8, 16])
@pytest.mark.parametrize("estimator", ["coupled", "exact_count", "bernoulli"])
def test_masked_positions_and_nothing_else_are_noised_and_predicted(
    estimator, rows_per_batch: int
) -> None:
    packed, ids, num_mc = sequences(), torch.arange(4), 4
    drawn = elbo_views(estimator, stream(5, "test-batch"), ids, ids, 4, LENGTH, num_mc)
    n, m, v, _ = drawn.mask_indices.shape
    expected = []
    for i in range(n):
        for j in range(m):
            for k in range(v):
                row, start = packed.tokens[i].tolist(), int(packed.prompt_lengths[i])
                masked = drawn.mask_indices[i, j, k].nonzero()[:, 0].tolist()
                noised = [MASK if p - start in masked else t for p, t in enumerate(row)]
                expected.append((noised, start, masked, row))
    found = []
    for view in view_batches(packed, drawn, MASK, VOCAB, rows_per_batch, same_width=False):
        batch, payload = view.batch, view.batch.payload
        assert (payload.num_rows, payload.num_columns) == (rows_per_batch, LENGTH)
        assert payload.vocab_size == VOCAB
        for r in range(rows_per_batch):
            noised, start, masked, row = expected[view.view_index[r]]
            here = payload.rows == r
            width = batch.tokens.size(1)
            assert batch.tokens[r].tolist() == noised[:width] and width >= start + LENGTH
            assert batch.lengths[r] == start + LENGTH
            if payload.is_dummy:
                assert (rows_per_batch, masked) == (1, [])
                continue
            assert payload.columns[here].tolist() == masked
            assert batch.rows[here].tolist() == [r] * len(masked)
            assert batch.positions[here].tolist() == [start + column for column in masked]
            assert payload.targets[here].tolist() == [row[start + column] for column in masked]
            found += [(int(view.view_index[r]), column) for column in masked]
    assert len(found) == len(set(found)) == int(drawn.mask_indices.sum())
    assert torch.equal(packed.tokens, sequences().tokens)  # the clean rows are left alone


def test_one_micro_batch_without_masks_reads_one_row_that_has_a_predecessor() -> None:
    packed = sequences()
    nothing = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts = packed.prompt_lengths[:2]
    batch = mask_rows(packed.tokens[:2], starts + LENGTH, nothing, starts, MASK, VOCAB)
    assert batch.payload.is_dummy
    assert torch.equal(batch.tokens, packed.tokens[:2])
    # A model with shifted logits reads the hidden state at position - 1.
    assert (batch.rows.tolist(), batch.positions.tolist()) == ([0], [1])
    assert batch.payload.targets.tolist() == [int(packed.tokens[0, 1])]
    nothing[1, 3] = True
    batch = mask_rows(packed.tokens[:2], starts + LENGTH, nothing, starts, MASK, VOCAB)
    assert not batch.payload.is_dummy
    assert (batch.rows.tolist(), batch.positions.tolist()) == ([1], [4])


def test_cross_entropy_lands_at_the_row_and_column_it_belongs_to(one_rank) -> None:
    mask = torch.tensor([[False, True, False], [False] * 3, [True, False, True]])
    tokens = torch.tensor([[7, 0, 1, 2], [7, 1, 2, 3], [7, 3, 2, 1]])
    starts = torch.ones(3, dtype=torch.int64)
    batch = mask_rows(tokens, starts + 3, mask, starts, 8, vocab_size=5)
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    table = masked_cross_entropy(one_rank)(logits.clone(), batch.payload)
    oracle = -logits[:, :5].double().log_softmax(1)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    # In order of rows and columns: token 1 of row 0, tokens 3 and 1 of row 2.
    expected[0, 1], expected[2, 0], expected[2, 2] = oracle[0, 1], oracle[1, 3], oracle[2, 1]
    assert table.dtype == torch.float32
    assert torch.allclose(table.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_dummy_row_has_no_loss_and_a_gradient_of_zeros(one_rank) -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    tokens = torch.tensor([[7, 0, 1, 2], [7, 1, 2, 3]])
    starts = torch.ones(2, dtype=torch.int64)
    batch = mask_rows(tokens, starts + 3, mask, starts, 8, vocab_size=5)
    weight = torch.randn(1, 6, requires_grad=True, generator=torch.Generator().manual_seed(0))
    table = masked_cross_entropy(one_rank)(weight * 2, batch.payload)
    assert table.tolist() == [[0.0] * 3] * 2
    table.sum().backward()
    assert weight.grad.tolist() == [[0.0] * 6]


def test_masked_prompt_tokens_are_hidden_and_not_predicted() -> None:
    packed, drawn = sequences(), views(1)
    prompts = torch.rand(4, 1, 1, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    plain = view_batches(packed, drawn, MASK, VOCAB, 2, same_width=False)
    hidden = view_batches(packed, drawn, MASK, VOCAB, 2, same_width=False, prompt_masks=prompts)
    assert prompts[2].any() and not prompts[2].all()
    for before, after in zip(plain, hidden, strict=True):
        assert torch.equal(before.batch.payload.targets, after.batch.payload.targets)
        assert torch.equal(before.batch.positions, after.batch.positions)
        for row, view in enumerate(before.view_index.tolist()):
            sequence = view // 2
            expected = before.batch.tokens[row].clone()
            for place in range(int(packed.prompt_lengths[sequence])):
                if prompts[sequence, 0, 0, place]:
                    expected[place] = MASK
            assert torch.equal(after.batch.tokens[row], expected)
    assert torch.equal(packed.tokens, sequences().tokens), "what was packed stays as it is"
