"""What a checkpoint inside a rollout holds, and files that a kill left behind."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_espo.checkpoint.tracker import (
    TRACKER,
    espo_folder,
    has_checkpoint,
    iteration_folder,
    repair_tracker,
)
from megatron_espo.config import EspoConfig
from megatron_espo.data.tokenizer import byte_tokenizer
from megatron_espo.evaluation.scoring import decode_completions
from megatron_espo.generation.sampler import Generation
from megatron_espo.monitor.curves import read_scalars
from megatron_espo.monitor.tensorboard import begin_events
from megatron_espo.passes.shapes import Shapes
from megatron_espo.rl import resume, state
from megatron_espo.rl.rollout import assemble_rollout
from megatron_espo.rl.types import PreparedRollout, Prompt
from megatron_espo.tasks.base import Example, Score

ESPO = EspoConfig(prompts_per_rollout=4, group_size=3, updates_per_rollout=2, num_mc=2)
TOKENIZER = byte_tokenizer()
N, LENGTH = ESPO.completions_per_rollout, 5


def model(dp_rank: int, dp_size: int) -> SimpleNamespace:
    layout = SimpleNamespace(dp_rank=dp_rank, dp_size=dp_size, dp="group")
    return SimpleNamespace(layout=layout, pad_token_id=0, shapes=Shapes(), stop_token_ids=(257,))


def prompts(dp_rank: int, dp_size: int) -> list[Prompt]:
    every = [Prompt(7 + i, (65,) * (i + 1), Example("A" * (i + 1), {})) for i in range(4)]
    share = 4 // dp_size
    return every[dp_rank * share : (dp_rank + 1) * share]


def prepared(dp_rank: int, dp_size: int, with_reference: bool) -> PreparedRollout:
    """A data-parallel rank's share of one and the same rollout."""
    generator = torch.Generator().manual_seed(3)
    completions = torch.randint(66, 90, (N, LENGTH), generator=generator)
    completions[::2, -1] = 257
    elbos = torch.randn(2, 2, N, 2, generator=generator)
    rows = slice(dp_rank * N // dp_size, (dp_rank + 1) * N // dp_size)
    scores = [Score(i / 8, i % 3 == 0, {"kept": i / 4} if i % 2 else {}) for i in range(N)][rows]
    texts = decode_completions(completions[rows], TOKENIZER, (257,))
    cost = torch.arange(N)[rows]
    work = (cost[:, None] * 5 + torch.arange(4)).double()
    generation = Generation(completions[rows], cost + 9, cost + 20, cost / N, work)
    rollout = assemble_rollout(
        model(dp_rank, dp_size), prompts(dp_rank, dp_size), generation, texts, scores, ESPO
    )
    old, ref = (tuple(part[:, rows]) for part in elbos)
    return PreparedRollout(rollout, old, ref if with_reference else (None, None))


def same(ours: PreparedRollout, theirs: PreparedRollout) -> bool:
    tensors = ("sample_ids", "indices", "rewards", "advantages", "completion_lengths")
    tensors += ("num_evaluations", "num_committed", "mean_confidence")
    return (
        all(torch.equal(getattr(ours.rollout, n), getattr(theirs.rollout, n)) for n in tensors)
        and torch.equal(ours.rollout.sequences.tokens, theirs.rollout.sequences.tokens)
        and list(ours.rollout.scores) == list(theirs.rollout.scores)
        and ours.rollout.texts == theirs.rollout.texts
        and str(ours.elbo_old) == str(theirs.elbo_old)
        and str(ours.elbo_ref) == str(theirs.elbo_ref)
    )


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize(("saved", "resumed"), [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2)])
def test_a_rollout_in_hand_moves_to_any_number_of_data_parallel_ranks(
    saved: int, resumed: int, with_reference: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [prepared(rank, saved, with_reference) for rank in range(saved)]
    collected: list[dict] = []

    def collect(parts: list, share: dict, group: str) -> None:
        collected.append(share)

    def gather(parts: list, share: dict, group: str) -> None:
        parts[:] = collected

    # First every rank's share, then what the gather gives to each.
    monkeypatch.setattr(resume.dist, "all_gather_object", collect)
    for rank, share in enumerate(shares):
        if saved > 1:
            with pytest.raises(TypeError):
                resume.record_rollout(share, model(rank, saved).layout)
    monkeypatch.setattr(resume.dist, "all_gather_object", gather)
    records = [
        resume.record_rollout(share, model(rank, saved).layout) for rank, share in enumerate(shares)
    ]
    torch.save(records[-1], tmp_path / "record.pt")
    record = torch.load(tmp_path / "record.pt", weights_only=True)
    for rank in range(resumed):
        restored = resume.restore_rollout(
            record, prompts(rank, resumed), model(rank, resumed), TOKENIZER, ESPO
        )
        assert same(restored, prepared(rank, resumed, with_reference))
        assert not same(restored, prepared((rank + 1) % 4, 4, with_reference))


def test_a_checkpoint_that_is_there_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = SimpleNamespace(
        save=str(tmp_path), save_interval=4, iteration=6, train_iters=20, global_batch_size=2
    )
    written: list[int] = []
    monkeypatch.setattr(state, "get_args", lambda: args)
    monkeypatch.setattr(state.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(state, "save_checkpoint", lambda step, *_: written.append(step))
    checkpoints = state.Checkpoints([], None, None, None, ESPO, None)
    assert [checkpoints.is_due(step) for step in (7, 8, 20)] == [False, True, True]
    checkpoints.save(state.RunState(6))  # loaded at this step
    assert written == [] and not list(tmp_path.iterdir())
    checkpoints.save(state.RunState(8))
    folder = Path(espo_folder(str(tmp_path), 8))
    assert written == [8] and torch.load(folder / "state.pt")["evaluation_due"] is False
    # SIGTERM in the next rollout's sampling.
    checkpoints.save(state.RunState(8, evaluation_due=True))
    assert written == [8] and torch.load(folder / "state.pt")["evaluation_due"] is False
    checkpoints.save(state.RunState(9))
    assert written == [8, 9] and args.consumed_train_samples == 18


def test_events_after_the_checkpoint_are_replaced(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    # Killed before its first checkpoint, started anew, killed after step 4, resumed from step 2.
    starts = ((0, [7.0, 8.0]), (0, [1.0, 2.0, 3.0, 4.0]), (2, [30.0, 40.0, 50.0]))
    for number, (resumed_at, values) in enumerate(starts):
        # Files are read in the order of the seconds in their names; starts lie further apart.
        time.sleep(1.1)
        with SummaryWriter(str(tmp_path), filename_suffix=str(number)) as writer:
            begin_events(writer, resumed_at)
            if resumed_at == 0:
                writer.add_scalar("accuracy", number, 0)
            for step, value in enumerate(values, start=resumed_at + 1):
                writer.add_scalar("loss", value, step)
    curves = read_scalars(tmp_path)
    assert curves["loss"] == ([1, 2, 3, 4, 5], [1.0, 2.0, 30.0, 40.0, 50.0])
    assert curves["accuracy"] == ([0], [1.0])


@pytest.mark.parametrize("content", ["", "\n", "12x", "\0\0"])
def test_broken_tracker_goes_back_to_the_newest_finished_checkpoint(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, finished in ((4, True), (12, True), (20, False)):
        folder = Path(iteration_folder(str(tmp_path), step))
        folder.mkdir()
        if finished:
            (folder / "metadata.json").write_text("{}")
    (tmp_path / TRACKER).write_text(content)
    repair_tracker(str(tmp_path))
    assert (tmp_path / TRACKER).read_text() == "12"
    assert "iteration 12" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [TRACKER]


@pytest.mark.parametrize("content", ["8", "8\n", "release"])
def test_whole_tracker_is_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "iter_0000012").mkdir()
    (tmp_path / "iter_0000012" / "metadata.json").write_text("{}")
    (tmp_path / TRACKER).write_text(content)
    repair_tracker(str(tmp_path))
    assert (tmp_path / TRACKER).read_text() == content


def test_broken_tracker_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    assert not has_checkpoint(str(tmp_path)) and not has_checkpoint(None)
    repair_tracker(str(tmp_path))
    (tmp_path / TRACKER).write_text("")
    assert has_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path}.*names no iteration"):
        repair_tracker(str(tmp_path))


@pytest.mark.parametrize("in_hand", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "always"),
    [
        ("updates_per_rollout", 3, True),
        ("prompts_per_rollout", 8, False),
        ("group_size", 6, False),
        ("num_mc", 1, False),
        ("elbo_estimator", "bernoulli", False),
    ],
)
def test_a_rollout_in_hand_keeps_the_settings_it_was_made_with(
    tmp_path: Path, in_hand: bool, name: str, value: int | str, always: bool
) -> None:
    folder = tmp_path / "iter_0000003" / "espo"
    folder.mkdir(parents=True)
    rollout = {"completions": torch.zeros(1)} if in_hand else None
    saved = {"evaluation_due": False, "rollout": rollout, **state._shape(ESPO)}
    torch.save(saved, folder / "state.pt")
    changed = replace(ESPO, **{name: value})
    assert state.load_run_state(str(tmp_path), 3, ESPO, None).step == 3
    if in_hand or always:
        flag = f"--espo-{name.replace('_', '-')} {getattr(ESPO, name)}, here it is {value}"
        with pytest.raises(ValueError, match=flag):
            state.load_run_state(str(tmp_path), 3, changed, None)
    else:
        assert state.load_run_state(str(tmp_path), 3, changed, None).rollout is None
