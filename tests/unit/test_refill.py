"""Further prompts in the place of groups without spread: the same in every layout."""

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_espo.generation.sampler import Generation
from megatron_espo.rl import refill as module
from megatron_espo.rl.prompts import further_prompts, prompts_of_rollout
from megatron_espo.rl.refill import Completed, Refilled, refill
from megatron_espo.rl.types import Prompt, Refill
from megatron_espo.tasks.base import Example, Score

G, STOP = 2, 99
EXAMPLES = [Example(f"problem {i}", {"number": i}) for i in range(12)]
ENCODED = [(i, i + 1) for i in range(12)]
# Problems whose completions have more than one reward.
WITH_SPREAD = {1, 4, 5, 7}


def complete(prompts: Sequence[Prompt]) -> Completed:
    """Completions whose tokens, cost and rewards are functions of the prompt."""
    numbers = torch.tensor([p.example.answer["number"] for p in prompts for _ in range(G)])
    numbers = numbers.long()
    scores = [
        Score(float(p.example.answer["number"] in WITH_SPREAD and i == 0), i == 0, {})
        for p in prompts
        for i in range(G)
    ]
    columns = numbers[:, None]
    completions = torch.cat((columns, torch.full_like(columns, STOP)), dim=1)
    generation = Generation(
        completions, numbers + 20, numbers + 30, numbers / 7, columns.double().expand(-1, 4),
        columns.int().expand(-1, 2) + 40,
    )  # fmt: skip
    return Completed(prompts, generation, [f"text {n}" for n in numbers.tolist()], scores)


def run(dp_size: int, count: int, monkeypatch: pytest.MonkeyPatch, rollout: int = 0) -> list[Any]:
    """Refill one rollout of four prompts on ranks that are threads."""
    every = prompts_of_rollout(rollout, 4, EXAMPLES, ENCODED, 1)
    further = further_prompts(rollout, 4, EXAMPLES, ENCODED, 1)[:count]
    barrier, sent = threading.Barrier(dp_size, timeout=20), [None] * dp_size
    results: list[Any] = [None] * dp_size

    def gather(parts: list[Any], mine: Any, group: int) -> None:
        sent[group] = mine
        barrier.wait()
        parts[:] = list(sent)
        barrier.wait()

    monkeypatch.setattr(module.dist, "all_gather_object", gather)

    def work(rank: int) -> None:
        layout: Any = SimpleNamespace(dp_rank=rank, dp_size=dp_size, dp=rank)
        share = 4 // dp_size
        mine = complete(every[rank * share : (rank + 1) * share])
        results[rank] = refill(mine, further, complete, G, layout, (STOP,))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(dp_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def numbers(completed: Completed) -> list[int]:
    return [prompt.example.answer["number"] for prompt in completed.prompts]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("rollout", [0, 1, 5])
def test_refills_do_not_depend_on_the_layout(
    count: int, rollout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (alone,) = run(1, count, monkeypatch, rollout)
    for dp_size in (2, 4):
        parts: list[Refilled] = run(dp_size, count, monkeypatch, rollout)
        assert all(part.refills == alone.refills for part in parts)
        for name in ("texts", "scores", "prompts"):
            joined = [value for part in parts for value in getattr(part.completed, name)]
            assert joined == list(getattr(alone.completed, name))
        for ours, theirs in zip(
            zip(*(part.completed.generation for part in parts), strict=True),
            alone.completed.generation, strict=True,
        ):  # fmt: skip
            assert torch.equal(torch.cat(ours), theirs)
        places = [part.discarded.places for part in parts]
        assert torch.equal(torch.cat(places), alone.discarded.places)
        work = torch.cat([part.discarded.work for part in parts])
        assert torch.equal(work, alone.discarded.work)


@pytest.mark.parametrize("rollout", range(4))
def test_groups_without_spread_get_the_next_further_prompts(
    rollout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a plain loop over places and candidates."""
    for count in range(9):
        (found,) = run(1, count, monkeypatch, rollout)
        every = prompts_of_rollout(rollout, 4, EXAMPLES, ENCODED, 1)
        queue = list(enumerate(further_prompts(rollout, 4, EXAMPLES, ENCODED, 1)[:count]))
        wanted = [prompt.example.answer["number"] for prompt in every]
        missing, refills = [i for i in range(4) if wanted[i] not in WITH_SPREAD], []
        sampled = list(wanted)
        while missing and queue:
            left = []
            for place in missing:
                if not queue:
                    left.append(place)
                    continue
                number, prompt = queue.pop(0)
                sampled.append(prompt.example.answer["number"])
                if sampled[-1] in WITH_SPREAD:
                    wanted[place] = sampled[-1]
                    refills.append(Refill(place, number))
                else:
                    left.append(place)
            missing = left
        assert numbers(found.completed) == wanted and list(found.refills) == sorted(refills)
        # What is in the record is enough to find the prompts again.
        again = prompts_of_rollout(rollout, 4, EXAMPLES, ENCODED, 1, refills=found.refills)
        assert again == list(found.completed.prompts)
        # Every completion that was sampled is kept once, with what it cost.
        assert len(found.discarded.scores) == G * (len(sampled) - 4)
        cost = torch.cat((found.completed.generation.work[:, 0], found.discarded.work[:, 0]))
        assert sorted(cost.tolist()) == sorted(n for n in sampled for _ in range(G))
        assert (found.discarded.completion_lengths == 1).all()


def test_further_prompts_are_other_problems_with_ids_of_their_own() -> None:
    ids = set()
    for rollout in range(5):
        own = prompts_of_rollout(rollout, 4, EXAMPLES, ENCODED, 1)
        further = further_prompts(rollout, 4, EXAMPLES, ENCODED, 1)
        problems = [p.example.answer["number"] for p in (*own, *further)]
        assert sorted(problems) == list(range(12))
        ids |= {p.group_id for p in (*own, *further)}
    assert len(ids) == 5 * 12
    assert further != further_prompts(4, 4, EXAMPLES, ENCODED, 2)


def test_a_run_that_is_told_to_stop_has_no_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    layout: Any = SimpleNamespace(dp_rank=0, dp_size=1, dp=0)
    every = prompts_of_rollout(0, 4, EXAMPLES, ENCODED, 1)
    further = further_prompts(0, 4, EXAMPLES, ENCODED, 1)
    assert refill(complete(every), further, lambda _: None, G, layout, (STOP,)) is None
