"""What a checkpoint inside a rollout holds, and files that a kill left behind."""

import time
from argparse import Namespace
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
    resumed_iteration,
)
from megatron_espo.config import EspoConfig
from megatron_espo.data.tokenizer import byte_tokenizer
from megatron_espo.errors import UserError
from megatron_espo.evaluation.problems import TaskData
from megatron_espo.evaluation.scoring import decode_completions
from megatron_espo.generation.sampler import Generation
from megatron_espo.monitor.curves import read_scalars
from megatron_espo.monitor.tensorboard import begin_events
from megatron_espo.passes.shapes import Shapes
from megatron_espo.rl import resume, state
from megatron_espo.rl.prompts import prompts_of_rollout
from megatron_espo.rl.provenance import check_provenance, prompts_digest, settings_of
from megatron_espo.rl.rollout import place_completions, with_scores
from megatron_espo.rl.types import Discarded, PreparedRollout, Prompt, Refill
from megatron_espo.tasks.base import Example, Score

ESPO = EspoConfig(prompts_per_rollout=4, group_size=3, updates_per_rollout=2, num_mc=2)
TOKENIZER = byte_tokenizer()
OTHER_TOKENIZER = byte_tokenizer()
OTHER_TOKENIZER.add_tokens(["ab"])
DATA = TaskData([Example("A" * i, {}) for i in range(6)], [(65,) * (i + 1) for i in range(6)])
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
    scores = [
        Score(i / 8, i % 3 == 0, {"kept": i / 4} if i % 2 else {}, None, ((0, 1, i / 9),) * (i % 3))
        for i in range(N)
    ][rows]
    texts = decode_completions(completions[rows], TOKENIZER, (257,))
    cost = torch.arange(N)[rows]
    work = (cost[:, None] * 5 + torch.arange(4)).double()
    steps = (cost[:, None] * 3 + torch.arange(LENGTH)).int()[:, : LENGTH if with_reference else 0]
    generation = Generation(completions[rows], cost + 9, cost + 20, cost / N, work, steps)
    refilled = [Refill(0, 2), Refill(2, 0)] if with_reference else []
    rollout = with_scores(
        place_completions(
            model(dp_rank, dp_size), prompts(dp_rank, dp_size), generation, ESPO.group_size
        ),
        texts, scores, ESPO, refilled, discarded(dp_rank, dp_size) if with_reference else None,
    )  # fmt: skip
    old, ref = (tuple(part[:, rows]) for part in elbos)
    return PreparedRollout(rollout, old, ref if with_reference else (None, None))


def discarded(dp_rank: int, dp_size: int) -> Discarded:
    """Groups that were replaced: one at the first place, two at the third."""
    places = [p for p in (0, 2, 2) if p * dp_size // 4 == dp_rank]
    cost = torch.tensor([10 * p + i for p in places for i in range(3)]).long()
    scores = [Score(0.0, False, {"kept": float(value)}) for value in cost.tolist()]
    work = cost[:, None].double().expand(-1, 4)
    return Discarded(torch.tensor(places).long(), scores, cost, cost, cost, cost / N, work)


def same(ours: PreparedRollout, theirs: PreparedRollout) -> bool:
    tensors = ("sample_ids", "indices", "rewards", "advantages", "completion_lengths")
    tensors += ("num_evaluations", "num_committed", "mean_confidence", "commit_steps")
    return (
        all(torch.equal(getattr(ours.rollout, n), getattr(theirs.rollout, n)) for n in tensors)
        and torch.equal(ours.rollout.sequences.tokens, theirs.rollout.sequences.tokens)
        and list(ours.rollout.scores) == list(theirs.rollout.scores)
        and str(ours.rollout.discarded) == str(theirs.rollout.discarded)
        and ours.rollout.refills == theirs.rollout.refills
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
                resume.record_rollout(share, model(rank, saved).layout, "digest")
    monkeypatch.setattr(resume.dist, "all_gather_object", gather)
    records = [
        resume.record_rollout(share, model(rank, saved).layout, "digest")
        for rank, share in enumerate(shares)
    ]
    torch.save(records[-1], tmp_path / "record.pt")
    record = torch.load(tmp_path / "record.pt", weights_only=True)
    if not with_reference:
        del record["commit_steps"]  # from before there were step maps
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
    checkpoints = state.Checkpoints([], None, None, None, {}, None)
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


def check(saved: dict, step: int, source: str, espo, seed: int, tokenizer, data) -> None:
    check_provenance(saved, step, source, espo, seed, settings_of(espo, seed, tokenizer), data)


RIGHT = {"espo": ESPO, "seed": 1, "tokenizer": TOKENIZER, "data": DATA}
OTHER_PROMPTS = TaskData(DATA.examples, [(*ids, 66) for ids in DATA.encoded])


def checkpoint_at(step: int, root: Path) -> str:
    """ESPO's part of a checkpoint: after step 3 a rollout of two updates is in hand."""
    digest = prompts_digest(prompts_of_rollout(step // 2, 4, DATA.examples, DATA.encoded, 1))
    rollout = {"prompts": digest} if step % 2 else None
    folder = Path(espo_folder(str(root), step))
    folder.mkdir(parents=True)
    made_with = settings_of(ESPO, 1, TOKENIZER)
    saved = {"evaluation_due": False, "rollout": rollout, "made_with": made_with}
    torch.save(saved, folder / "state.pt")
    return str(root)


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize(
    ("changed", "said", "always"),
    [
        ({"espo": replace(ESPO, updates_per_rollout=3)}, "--espo-updates-per-rollout 2.* 3", True),
        ({"tokenizer": OTHER_TOKENIZER}, "another vocabulary.*--tokenizer-model", True),
        ({"seed": 7}, "--seed 1, here it is 7", False),
        ({"espo": replace(ESPO, task="math")}, "--espo-task sudoku, here it is math", False),
        ({"espo": replace(ESPO, prompts_per_rollout=8)}, "--espo-prompts-per-rollout 4", False),
        ({"espo": replace(ESPO, group_size=6)}, "--espo-group-size 3, here it is 6", False),
        ({"espo": replace(ESPO, num_mc=1)}, "--espo-num-mc 2, here it is 1", False),
        ({"espo": replace(ESPO, elbo_estimator="bernoulli")}, "--espo-elbo-estimator", False),
        ({"espo": replace(ESPO, kl_estimator="k2_unbiased")}, "--espo-kl-estimator k2", False),
        ({"data": OTHER_PROMPTS}, "--espo-train-data", False),
    ],
    ids=lambda value: value.split(",")[0] if isinstance(value, str) else "",
)
def test_what_a_rollout_in_hand_was_made_with_stays(
    tmp_path: Path, step: int, changed: dict, said: str, always: bool
) -> None:
    root = checkpoint_at(step, tmp_path)
    saved = state.read_state(root, step)
    check(saved, step, f"--load {root}", **RIGHT)
    if always or step == 3:
        with pytest.raises(UserError, match=f"--load {root}: .*{said}"):
            check(saved, step, f"--load {root}", **(RIGHT | changed))
    else:
        check(saved, step, f"--load {root}", **(RIGHT | changed))
        assert state.load_run_state(root, step, saved, None).rollout is None


def test_further_prompts_of_a_rollout_in_hand_are_known_again(tmp_path: Path) -> None:
    saved = state.read_state(checkpoint_at(3, tmp_path), 3)
    own = (1, 4, DATA.examples, DATA.encoded, 1)
    refills = [[1, 0]]
    saved["rollout"]["refills"] = refills
    with pytest.raises(UserError, match="other prompts"):
        check(saved, 3, "", **RIGHT)
    saved["rollout"]["prompts"] = prompts_digest(prompts_of_rollout(*own, refills=[Refill(1, 0)]))
    # How many there may be is of no account for those that there are.
    check(saved, 3, "", **(RIGHT | {"espo": replace(ESPO, refill=5)}))
    fewer = TaskData(DATA.examples[:4], DATA.encoded[:4])
    with pytest.raises(UserError, match="other prompts"):
        check(saved, 3, "", **(RIGHT | {"data": fewer}))


@pytest.mark.parametrize(
    "changed", [{"kl_estimator": "k3"}, {"kl_coef": 0.0}, {"clip_eps_low": 0.1}, {"task": "sudoku"}]
)
def test_what_a_rollout_in_hand_does_not_depend_on_may_change(
    tmp_path: Path, changed: dict
) -> None:
    saved = state.read_state(checkpoint_at(3, tmp_path), 3)
    check(saved, 3, "", **(RIGHT | {"espo": replace(ESPO, **changed)}))


def test_a_checkpoint_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "iter_0000003").mkdir()
    with pytest.raises(UserError, match="iteration 3 was not written by an ESPO run"):
        state.read_state(str(tmp_path), 3)


@pytest.mark.parametrize(
    ("mark", "flags", "iteration"),
    [
        ("12", {}, 12), ("release", {}, 0), ("12", {"finetune": True}, 0),
        ("12", {"ckpt_step": 4}, 4), (None, {}, 0),
    ],
)  # fmt: skip
def test_where_a_run_goes_on(tmp_path: Path, mark: str | None, flags: dict, iteration: int) -> None:
    if mark is not None:
        (tmp_path / TRACKER).write_text(mark)
    args = {"load": str(tmp_path), "finetune": False, "ckpt_step": None}
    assert resumed_iteration(Namespace(**(args | flags))) == iteration


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no such thing"])
def test_a_state_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    path = Path(espo_folder(str(tmp_path), 4), "state.pt")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"state\.pt: cannot be read.*--ckpt-step"):
        state.read_state(str(tmp_path), 4)


def test_a_copy_of_a_checkpoint_beside_it_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").touch()
    for name in ("iter_0000004", "iter_0000009.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.json").touch()
    repair_tracker(str(tmp_path))
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"
