"""Fine-tuning rows: as long as they should be, handed out by length, cut without an effect."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch.utils.data import DataLoader

from megatron_espo.config import DiffusionConfig, SftConfig
from megatron_espo.data.sft import SftRows, read_rows
from megatron_espo.data.sft_dataset import SftDataset
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer, special_ids
from megatron_espo.errors import UserError
from megatron_espo.passes.shapes import Shapes
from megatron_espo.random import stream
from megatron_espo.supervised import rows as sft
from megatron_espo.supervised.forward_step import noise_batch
from megatron_espo.training import pretrain

TOKENIZER = byte_tokenizer()
IDS = special_ids(TOKENIZER)
N = 40


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples of 4 to 82 tokens, no two alike."""
    path = tmp_path_factory.mktemp("sft") / "examples.jsonl"
    lines = [
        {"prompt": f"{n:02}" + "p" * (n % 7), "completion": "c" * (1 + 73 * n % 71)}
        for n in range(N)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def rows(file: Path) -> SftRows:
    return read_rows(file, TOKENIZER, IDS, seq_length=96)


def by_place(data: SftDataset) -> dict[int, Any]:
    return {int(row["sample_id"]): row for row in data}


@pytest.mark.parametrize("longest_of", [0, 1, 4])
@pytest.mark.parametrize("first", [0, 5])
def test_rows_of_a_step_are_the_same_ones_the_longest_first(
    rows: SftRows, longest_of: int, first: int
) -> None:
    settings: dict[str, Any] = {"num_samples": 100, "seed": 3, "longest_of": longest_of}
    plain, sorted_rows = (
        SftDataset(rows, **settings),
        SftDataset(rows, **settings, batch_size=16, first=first),
    )
    handed = list(sorted_rows)
    lengths = [int(row["prompt_length"] + row["completion_length"]) for row in handed]
    # Batches begin where the run was saved; the second one spans two epochs.
    for start in range(first, 100, 16):
        batch = slice(start, min(start + 16, 100))
        places = [int(row["sample_id"]) for row in handed[batch]]
        assert sorted(places) == list(range(100))[batch]
        assert lengths[batch] == sorted(lengths[batch], reverse=True)
    assert longest_of == 0 or lengths[first : first + 16] != sorted(lengths[first : first + 16])
    for place, row in by_place(sorted_rows).items():
        assert all(torch.equal(row[name], plain[place][name]) for name in row)
    places = np.arange(100)
    assert plain.lengths(places).tolist() == [
        int(plain[p]["prompt_length"] + plain[p]["completion_length"]) for p in range(100)
    ]


def test_completions_are_filled_up_to_the_longest_of_some_examples(rows: SftRows) -> None:
    own = rows.lengths()
    alone = SftDataset(rows, longest_of=1, shuffle=False)
    assert alone.lengths(np.arange(N)).tolist() == own.tolist()
    row = SftDataset(rows, longest_of=3, shuffle=False, num_samples=2)[1]
    length = int(row["prompt_length"] + row["completion_length"])
    assert (row["tokens"][own[1] - 1 : length] == IDS.eos_token_id).all()
    assert (row["tokens"][length:] == IDS.pad_token_id).all() and length < 96
    # Over many epochs: an example is longer than itself as often as any of three others is longer.
    many = SftDataset(rows, longest_of=4, num_samples=400 * N, shuffle=False)
    filled = many.lengths(np.arange(len(many))).reshape(400, N)
    assert set(filled.flatten()) <= set(own) and filled.max() <= many.length_range()[1]
    share = (filled > own).mean(axis=0)
    wanted = 1 - np.array([(own <= length).mean() for length in own]) ** 3
    assert np.abs(share - wanted).max() < 5 * math.sqrt(0.25 / 400)


@pytest.mark.parametrize("process", ["bernoulli", "exact_count"])
@pytest.mark.parametrize("shift", [False, True])
def test_cutting_a_batch_leaves_noise_and_targets_as_they_are(
    rows: SftRows, process: Any, shift: bool
) -> None:
    data = SftDataset(rows, longest_of=2, batch_size=8)
    batch = next(iter(DataLoader(data, batch_size=4)))
    config = DiffusionConfig(forward_process=process, logit_shift=shift)
    key, longest = stream(1, "test"), int((batch["prompt_length"] + batch["completion_length"])[0])
    whole, theirs, all_maskable = noise_batch(batch, config, key, 256, 262)
    for shapes, width in ((Shapes(), longest), (Shapes(4), -(-longest // 4) * 4)):
        cut, ours, maskable = noise_batch(batch, config, key, 256, 262, shapes)
        assert cut.tokens.shape == (4, width) and width < 96
        assert torch.equal(cut.tokens, whole.tokens[:, :width])
        assert torch.equal(ours.weights, theirs.weights)
        assert torch.equal(ours.mask_indices, theirs.mask_indices[:, :width])
        assert not theirs.mask_indices[:, width:].any() and not all_maskable[:, width:].any()
        assert torch.equal(maskable.sum(1), all_maskable.sum(1))
        assert torch.equal(cut.rows, whole.rows) and torch.equal(cut.positions, whole.positions)
        assert torch.equal(cut.payload.targets, whole.payload.targets)


def arguments(tokenizer: str, data: Path, **changed: Any) -> Any:
    """What the rows of a run depend on, at two data-parallel ranks."""
    args = {f"sft_{name}": value for name, value in vars(SftConfig()).items()} | {
        "sft_train_data": str(data), "tokenizer_model": tokenizer, "mask_token_id": 256,
        "seq_length": 96, "prompt_special_tokens": "refuse", "seed": 3, "train_iters": 9,
        "micro_batch_size": 2, "data_parallel_size": 2, "global_batch_size": 12,
        "eval_global_batch_size": 12, "consumed_train_samples": 0, "consumed_valid_samples": 0,
        "decrease_batch_size_if_needed": False, "step_batch_size_schedule": None,
        "rampup_batch_size": None, "train_samples": None, "tensor_model_parallel_size": 2,
        "context_parallel_size": 1, "sequence_parallel": True, "fp8": None, "fp8_recipe": None,
        "transformer_impl": "local",
    }  # fmt: skip
    return SimpleNamespace(**args | changed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(byte_tokenizer(), path)
    return str(path)


@pytest.mark.parametrize("few", [False, True])
def test_planned_widths_are_those_of_the_runs_micro_batches(
    folder: str, file: Path, few: bool
) -> None:
    args = arguments(folder, file, transformer_impl="transformer_engine" if few else "local")
    planned = sft.planned_rows(args)
    assert planned is not None
    data = sft.sft_dataset(args, str(file), 9 * 12, sft.Split.train)
    widths, tokens = [], 0
    shapes = sft._shapes(2, [data.length_range()], few)
    for rank in range(2):
        sampler = MegatronPretrainingSampler(len(data), 0, 2, rank, 2)
        for batch in DataLoader(data, batch_sampler=sampler):
            noised, _, _ = noise_batch(batch, DiffusionConfig(), stream(1, "t"), 256, 262, shapes)
            widths += [noised.tokens.size(1)] * 2
            tokens += int(noised.lengths.sum())
    assert len(widths) == 9 * 12 and all(width % 2 == 0 for width in widths)
    assert planned.mean_width == pytest.approx(sum(widths) / len(widths))
    assert planned.mean_length == pytest.approx(tokens / len(widths))
    assert max(planned.shares) == max(widths) and planned.num_examples == N
    # Less than half of the padding of rows of 96 is left.
    assert 0 < planned.mean_width - planned.mean_length < (96 - planned.mean_length) / 2


def test_rows_of_one_length_have_one_width(folder: str, file: Path) -> None:
    args = arguments(folder, file, sft_longest_of=0)
    data = sft.sft_dataset(args, str(file), 12, sft.Split.train)
    assert sft.row_shapes(args, [data]).widths == (96,)
    assert sft.planned_rows(arguments(folder, Path("none.jsonl"))) is None


def test_a_step_is_sorted_as_far_as_all_batch_sizes_allow(folder: str, file: Path) -> None:
    def size(**changed: Any) -> int:
        return sft.step_rows(arguments(folder, file, **changed))

    assert size() == 12
    assert size(rampup_batch_size=["4", "8", "1000"]) == 4
    assert size(step_batch_size_schedule="0:4") == size(decrease_batch_size_if_needed=True) == 4


def test_epochs_become_steps_and_the_last_one_is_filled_up(folder: str, file: Path) -> None:
    def steps(epochs: float, examples: int = N, batch: int = 12, **changed: Any) -> int:
        args = arguments(folder, file, sft_epochs=epochs, **changed)
        return sft.epoch_steps(args, examples, batch)

    assert [steps(1.0), steps(3.0), steps(0.1)] == [4, 10, 1]
    assert steps(3.0, examples=48) == 12  # no step too many where it fits
    with pytest.raises(UserError, match=r"--sft-epochs: --train-samples says otherwise"):
        steps(1.0, train_samples=100)
    args = arguments(folder, file, sft_epochs=3.0, dry_run=False)
    pretrain._settle_epochs(args, 12)
    assert args.train_iters == 10
    # Every example three times; what fills the last step up is of the fourth epoch.
    data = sft.sft_dataset(args, str(file), 120, sft.Split.train)
    seen = [bytes(row["tokens"][:2].tolist()) for _, row in sorted(by_place(data).items())]
    assert all(seen.count(b"%02d" % n) == 3 for n in range(N)) and len(seen) == 3 * N


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"longest_of": -1}, "--sft-longest-of -1 must be"),
        ({"epochs": -1.0, "train_data": "a"}, "--sft-epochs -1.0 must be"),
        ({"epochs": math.inf, "train_data": "a"}, "--sft-epochs inf must be"),
        ({"epochs": 1.0}, "--sft-epochs counts the examples of --sft-train-data"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SftConfig(**settings).validate()


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"sft_longest_of": 2}, {"sft_longest_of": 2}, None),
        ({"sft_longest_of": 4}, {"sft_longest_of": 1}, "--sft-longest-of 4, here it is 1"),
        # A run from before there was a choice filled its rows.
        ({}, {}, "--sft-longest-of 0, here it is 2"),
        ({}, {"sft_longest_of": 0}, None),
        (
            {"sft_completion_length": 8},
            {"sft_completion_length": 9},
            "--sft-completion-length 8, here it is 9",
        ),
        ({"sft_completion_length": 8}, {"sft_completion_length": 8}, None),
        ({"sft_train_data": None}, {}, None),
    ],
)
def test_a_run_goes_on_with_rows_as_it_was_saved_with(
    monkeypatch: pytest.MonkeyPatch, before: Any, now: Any, message: str | None
) -> None:
    stored = SimpleNamespace(**{"sft_train_data": "a", "sft_completion_length": None, **before})
    args = arguments("", Path("a"), load="run", **now)
    monkeypatch.setattr(pretrain, "resumed_iteration", lambda args: 4)
    monkeypatch.setattr(pretrain, "checkpoint_folder", lambda *_: "run")
    monkeypatch.setattr(pretrain, "stored_arguments", lambda _: stored)
    if message is None:
        pretrain._check_continued(args)
    else:
        with pytest.raises(UserError, match=message):
            pretrain._check_continued(args)
