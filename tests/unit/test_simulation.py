"""The parts of the simulation that are arithmetic: comparing ranks, rooflines, extrapolation."""

import argparse
import json
import os
import platform
import select
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_espo.config import LaunchConfig, SimulateConfig
from megatron_espo.dry_run import support
from megatron_espo.dry_run.chosen_ranks import chosen_ranks
from megatron_espo.dry_run.compare import find_mismatch
from megatron_espo.dry_run.extrapolate import Cost, espo_costs, rollout_cost
from megatron_espo.dry_run.record import Collective, Phase, Rank
from megatron_espo.dry_run.roofline import Ceilings
from megatron_espo.dry_run.simulation import make_job, simulate, without_own_flags

ROOT = Path(__file__).parents[2]
PAIR, WORLD = "0,1#0", "0,1,2,3#0"


def rank(number: int, *entries: tuple[str, str, int]) -> Rank:
    """A rank that made collectives (group, kind, bytes), each at a place of its own."""
    trace = [
        Collective(group, kind, size, "float32", f"place{number}{i}.py:1")
        for i, (group, kind, size) in enumerate(entries)
    ]
    return Rank(number, trace=trace)


SAME = [(PAIR, "all_reduce", 4), (PAIR, "all_gather", 8), (WORLD, "barrier", 0)]


def test_equal_sequences_agree() -> None:
    assert find_mismatch([rank(0, *SAME), rank(1, *SAME)]) is None


@pytest.mark.parametrize(
    "other",
    [
        [SAME[0], (PAIR, "all_gather", 16), SAME[2]],
        [SAME[0], (PAIR, "reduce_scatter", 8), SAME[2]],
        [SAME[1], SAME[0], SAME[2]],
        SAME[:1] + SAME[2:],
        [*SAME, (PAIR, "all_reduce", 4)],
    ],
    ids=["bytes", "kind", "order", "one is missing", "one more"],
)
def test_disagreement_is_named_with_both_places(other: list[tuple[str, str, int]]) -> None:
    found = find_mismatch([rank(0, *SAME), rank(1, *other)])
    assert found is not None
    assert "ranks 0 and 1" in found
    assert "place0" in found or "nothing there" in found
    assert "place1" in found or "nothing there" in found


def test_another_element_type_disagrees() -> None:
    first, second = rank(0, *SAME), rank(1, *SAME)
    second.trace[1].dtype = "bfloat16"
    assert "bfloat16" in str(find_mismatch([first, second]))


def test_ranks_that_are_not_simulated_are_not_missed() -> None:
    assert (
        find_mismatch([rank(0, (WORLD, "all_reduce", 4)), rank(3, (WORLD, "all_reduce", 4))])
        is None
    )


def test_groups_with_the_same_ranks_are_told_apart() -> None:
    first = rank(0, ("0,1#0", "all_reduce", 4), ("0,1#1", "all_reduce", 8))
    assert (
        find_mismatch([first, rank(1, ("0,1#0", "all_reduce", 4), ("0,1#1", "all_reduce", 8))])
        is None
    )
    assert find_mismatch([first, rank(1, ("0,1#1", "all_reduce", 4), ("0,1#0", "all_reduce", 8))])


def test_messages_between_stages_must_match() -> None:
    group = "2,5#0"
    sender = rank(2, (group, "send 1", 64), (group, "send 1", 64))
    assert find_mismatch([sender, rank(5, (group, "recv 0", 64), (group, "recv 0", 64))]) is None
    assert "from rank 2 to rank 5" in str(find_mismatch([sender, rank(5, (group, "recv 0", 64))]))
    other = rank(5, (group, "recv 0", 64), (group, "recv 0", 32))
    assert "message 2 from rank 2 to rank 5" in str(find_mismatch([sender, other]))


def test_two_groups_in_turn_block_each_other() -> None:
    """Group by group the sequences agree, but neither rank comes to what the other waits for."""
    first = rank(0, ("0,1#0", "all_reduce", 4), ("0,1#1", "all_reduce", 4))
    second = rank(1, ("0,1#1", "all_reduce", 4), ("0,1#0", "all_reduce", 4))
    found = find_mismatch([first, second])
    assert found is not None and "wait for each other" in found
    assert "place00.py:1" in found and "place10.py:1" in found


def test_ranks_travel_as_json() -> None:
    sent = rank(3, *SAME)
    sent.phases["rollout"] = Phase(peak=7, waits={"item at a.py:1": 2})
    sent.steps.append({"seconds": 0.5})
    assert Rank.from_json(json.loads(json.dumps(sent.as_json()))) == sent
    assert sent.phases["rollout"].num_waits == 2


def test_a_kernel_takes_the_longer_of_arithmetic_and_memory() -> None:
    ceilings = Ceilings(matmul=100.0, memory=10.0)
    assert ceilings.kernel(200.0, 10.0) == 2.0
    assert ceilings.kernel(200.0, 50.0) == 5.0
    assert ceilings.kernel(200.0, 10.0, fp8=True) == 1.0


def test_collectives_of_a_ring() -> None:
    ceilings = Ceilings(nvlink=10.0, network=1.0)
    assert ceilings.collective("all_gather", 4, 40, one_node=True) == 3.0
    assert ceilings.collective("reduce_scatter", 4, 40, one_node=False) == 30.0
    assert ceilings.collective("all_reduce", 4, 40, one_node=True) == 6.0
    assert ceilings.collective("broadcast", 4, 40, one_node=True) == 4.0
    assert ceilings.collective("all_reduce", 1, 40, one_node=True) == 0.0


def step(flops: float) -> dict[str, float]:
    return {"seconds": flops, "communication": 1.0, "flops": flops, "kernels": 10, "waits": 1}


def simulated(**phases: Phase) -> Rank:
    facts = {"micro_batches": 24, "simulated_micro_batches": 2, "rollout_rows": 40,
             "rollout_batch": 32, "denoising_steps": 16, "whole_passes": 4}  # fmt: skip
    return Rank(
        0, facts=facts, phases={k.replace("_passes", ": passes"): v for k, v in phases.items()}
    )


def test_whole_passes_and_windows_are_counted_by_their_kinds() -> None:
    plain = simulated()
    plain.steps = [step(4.0), step(2.5)]
    # Two waves of 16 steps.
    assert rollout_cost(plain) == Cost(320, 32 * 3.25, 32 * 3.25, 32)
    cached = simulated()
    cached.steps = [step(8.0), step(1.0), step(1.0)]
    assert rollout_cost(cached).flops == 8 * 8.0 + 24 * 1.0


def test_updates_are_extrapolated_by_what_they_repeat() -> None:
    passes = Phase(kernels=100, flops=10.0, seconds=2.0, communication={"tp": 1.0, "dp-cp": 4.0})
    found = espo_costs(
        simulated(
            update=Phase(kernels=6, seconds=1.0),
            update_passes=passes,
            old_elbo=Phase(kernels=20, flops=2.0, seconds=0.5),
            ref_elbo=Phase(kernels=40, flops=4.0, seconds=1.0),
        ),
        updates=8,
        simulated_updates=2,
    )
    # 12 times as many micro-batches, 4 times as many updates; what an update does once, 4 times.
    assert found["update"] == Cost(
        48 * 100 + 4 * 6, 48 * 10.0, 48 * 2.0 + 4 * 1.0, 48 * 1.0 + 4 * 4.0
    )
    assert found["old_elbo"].kernels == 20 * 12 * 7
    assert found["ref_elbo"].kernels == 40 * 12 * 4
    cost = Cost(kernels=10, device=1.0, communication=0.5)
    assert cost.seconds(Ceilings(launch=0.01)) == 1.5
    assert cost.seconds(Ceilings(launch=1.0)) == 10.0


def planned(**more: Any) -> argparse.Namespace:
    sizes = {"world_size": 8, "tensor_model_parallel_size": 2, "context_parallel_size": 1,
             "pipeline_model_parallel_size": 1, "data_parallel_size": 4,
             "use_tp_pp_dp_mapping": False}  # fmt: skip
    return argparse.Namespace(**(sizes | more))


def test_ranks_that_are_simulated() -> None:
    assert chosen_ranks(planned(), SimulateConfig()) == [0]
    stages = planned(world_size=16, pipeline_model_parallel_size=4, data_parallel_size=2)
    assert chosen_ranks(stages, SimulateConfig()) == [0, 8, 12]
    stages.use_tp_pp_dp_mapping = True
    assert chosen_ranks(stages, SimulateConfig()) == [0, 4, 6]
    assert chosen_ranks(planned(), SimulateConfig(compare=True)) == list(range(8))
    many = planned(world_size=32, data_parallel_size=16)
    # The first two copies of the model and the last one.
    assert chosen_ranks(many, SimulateConfig(compare=True)) == [0, 1, 2, 3, 30, 31]
    assert chosen_ranks(planned(), SimulateConfig(ranks="5,3,5")) == [3, 5]
    with pytest.raises(ValueError, match=r"--simulate-ranks 8: the run has ranks 0 to 7"):
        chosen_ranks(planned(), SimulateConfig(ranks="8"))


def test_ranks_that_make_passes_for_each_other_are_not_compared(tmp_path: Path) -> None:
    args = planned(num_experts=8, expert_model_parallel_size=8)
    args.expert_tensor_parallel_size = None
    for name, value in vars(SimulateConfig(compare=True)).items():
        setattr(args, f"simulate_{name}", value)
    with pytest.raises(ValueError, match="--simulate-compare: ranks that share experts go on"):
        make_job("megatron_espo.training.espo", [], args, 8, tmp_path)


def test_settings_are_checked() -> None:
    SimulateConfig(ranks="0,4").validate()
    for config, flag in (
        (SimulateConfig(ranks="first"), "--simulate-ranks"),
        (LaunchConfig(simulate=True), "add --dry-run"),
        (SimulateConfig(processes=0), "--simulate-processes"),
        (SimulateConfig(network_gbs=0.0), "--simulate-network-gbs"),
        (SimulateConfig(launch_us=float("nan")), "--simulate-launch-us"),
    ):
        with pytest.raises(ValueError, match=flag):
            config.validate()


def test_flags_of_the_dry_run_do_not_reach_the_job() -> None:
    flags = "--dry-run --simulate --simulate-ranks 0,1 --lr 1 --simulate-ranks=3 --bf16".split()
    flags += ["--dry-run-world-size", "4"]
    assert without_own_flags(flags) == ["--lr", "1", "--bf16"]


def test_every_flag_of_the_dry_run_is_known() -> None:
    """A flag that is added must be taken out of the job's command line, too."""
    names = [f"--{f.name}" for f in fields(LaunchConfig) if f.name != "recipe"]
    names += [f"--simulate-{f.name}" for f in fields(SimulateConfig)]
    for name in names:
        assert without_own_flags([f"{name.replace('_', '-')}=1"]) == [], name


def test_a_machine_without_transformer_engines_layer_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(support, "check", lambda: None)
    monkeypatch.setattr(support, "FOLDER", tmp_path / "nothing")
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    args = planned()
    args.transformer_impl = "transformer_engine"
    with pytest.raises(ValueError, match="make te"):
        simulate("megatron_espo.training.espo", [], args, 8)


def test_this_machine_can_simulate_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.cuda is not None and platform.machine() == "x86_64":
        assert support.check() is None
        # Destructors have two places; then come isBuilt and isAvailable.
        assert support.primary_context_slot() == 4
    monkeypatch.setattr(support.platform, "machine", lambda: "aarch64")
    assert "aarch64" in str(support.check())
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "build of PyTorch for CUDA" in str(support.check())


STARTS = """
import os, subprocess, sys
subprocess.run([sys.executable, "-m", "megatron_espo.simulate", str(os.getpid()), sys.argv[1]])
"""


def test_the_simulating_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    """It is reading its job from a pipe when its parent is killed."""
    job = tmp_path / "job.json"
    os.mkfifo(job)
    started = subprocess.Popen([sys.executable, "-c", STARTS, str(job)], cwd=ROOT)
    try:
        pipe = os.open(job, os.O_WRONLY)  # returns when the other side reads
    finally:
        started.kill()
        started.wait()
    with os.fdopen(pipe, "w"):
        poll = select.poll()
        poll.register(pipe, select.POLLERR)
        assert poll.poll(30_000), "it still reads"
