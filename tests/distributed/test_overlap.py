"""Overlapped gradient reduction and parameter gathers: the same step, mix and checkpoint."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Built, build_layout
from layouts import CASES
from megatron.core.utils import unwrap_model
from test_layouts import own_rows, prompts_and_completions
from torch import Tensor

from megatron_espo.checkpoint.compare import checkpoint_tensors, unequal_tensors
from megatron_espo.config import EspoConfig
from megatron_espo.diffusion.noise import elbo_views
from megatron_espo.passes.batch import pack_sequences, view_batches
from megatron_espo.passes.shapes import Shapes
from megatron_espo.random import stream
from megatron_espo.rl.elbo import elbo_of_views
from megatron_espo.rl.reference import ReferencePolicy
from megatron_espo.rl.run import RunState
from megatron_espo.rl.state import Checkpoints
from megatron_espo.rl.update import accumulate_gradient
from megatron_espo.startup.setup import inference_mode

N, LENGTH = 8, 8
ESPO = EspoConfig(num_mc=1, prompts_per_rollout=4, group_size=2)
OVERLAPPED = [name for name in CASES if name.endswith("overlapped")]


@dataclass(frozen=True)
class Outcome:
    """What a run holds after two steps."""

    policy: dict[str, Tensor]
    reference: Sequence[Tensor]
    elbo: Tensor
    saved: str


def two_steps(built: Built, folder: str) -> Outcome:
    """Two ESPO steps with a mix and a saved checkpoint behind them, as the trainer makes them."""
    prompts, completions = prompts_and_completions()
    rows = own_rows(built)
    ids = torch.arange(N)[rows]
    views = elbo_views("coupled", stream(5, "elbo"), ids, ids, N, LENGTH, 1)
    sequences = pack_sequences(prompts[rows], completions[rows], 0, Shapes(8))
    model = built.model
    batches = view_batches(sequences, views, model.mask_token_id, model.vocab_size, 2)
    chunks = list(model.chunks)
    reference = ReferencePolicy(chunks)
    advantages = torch.linspace(-1, 1, N)[rows]

    def step(gradient: str) -> None:
        for chunk in chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        built.optimizer.zero_grad()
        config = replace(ESPO, gradient=gradient)
        accumulate_gradient(model, batches, views, None, None, advantages, LENGTH, config, N)
        assert built.optimizer.step()[0]

    gathers: list[object] = []
    for chunk in chunks:
        start = chunk.start_param_sync
        chunk.start_param_sync = lambda *a, start=start, **k: (gathers.append(k), start(*a, **k))
    step("two_pass")
    step("joint")
    gathers.clear()
    for visit in range(2):
        # The first visit after a step gathers, if steps do not, and the next one has no reason to.
        with inference_mode(chunks, built.optimizer):
            if visit == 0:
                reference.mix(0.6)
                with reference.in_model():
                    pass  # weights that go and come back are still the newest
            elbo = elbo_of_views(model, batches, views)
        assert len(gathers) == len(chunks) * built.args.overlap_param_gather
    built.args.save, built.args.global_batch_size = folder, N
    checkpoints = Checkpoints(chunks, built.optimizer, built.scheduler, reference, {}, None)
    # Another step, so that what this rank holds of the others' shards is old when it saves.
    step("joint")
    checkpoints.save(RunState(3))
    dist.barrier()
    policy = {
        name: parameter.detach().clone()
        for chunk in unwrap_model(chunks)
        for name, parameter in chunk.named_parameters()
    }
    return Outcome(policy, reference._weights, elbo, folder)


@pytest.mark.parametrize("name", OVERLAPPED, ids=lambda name: name.replace(" ", "-"))
def test_overlap_changes_neither_steps_nor_mixes_nor_checkpoints(
    name: str, tokenizer_folder: str, checkpoints: dict[bool, str], shared_folder: str
) -> None:
    case, outcomes = CASES[name], []
    overlap = [flag for flag in case.flags if flag.startswith("--overlap")]
    assert len(overlap) == 2
    for flags in (case.flags, tuple(flag for flag in case.flags if flag not in overlap)):
        built = build_layout(
            tokenizer_folder, case.tp, case.pp,
            ("--pretrained-checkpoint", checkpoints[False], *flags),
        )  # fmt: skip
        folder = os.path.join(shared_folder, f"overlap-{case.tp}-{len(flags)}")
        outcomes.append(two_steps(built, folder))
    ours, theirs = outcomes
    assert not unequal_tensors(ours.policy, theirs.policy) and len(ours.policy) > 20
    for mine, yours in zip(ours.reference, theirs.reference, strict=True):
        assert torch.equal(mine, yours)
    assert torch.equal(ours.elbo, theirs.elbo)
    saved: Any = [checkpoint_tensors(outcome.saved) for outcome in outcomes]
    assert not unequal_tensors(*saved) and any("reference/" in name for name in saved[0])
