"""Every entry point at its smallest, as ranks of a node of GPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
OK = [
    "espo",
    "espo, cp",
    "espo, dual cache",
    "espo, fp8",
    "espo, lora",
    "espo, one gpu",
    "espo, blocks",
    "espo, experts",
    "pretrain",
    "pretrain, blocks",
    "sft",
    "evaluate",
    "evaluate, lora",
    "generate",
]
COMPARED = [
    *("espo", "espo, cp", "espo, dual cache", "espo, lora", "espo, blocks", "pretrain", "module"),
]
ESPO_PHASES = [
    *("build", "load", "reference", "evaluation", "rollout", "old_elbo", "ref_elbo", "update"),
    *("update: passes", "save"),
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # Without what the start scripts and the image set: torchrun alone starts the ranks.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "NVTE", "TORCH"))}
    paths = [str(HERE.parents[1]), str(HERE)]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        kept.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "entries.py"),
         str(tmp_path_factory.mktemp("jobs"))],
        env={**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", OK)
def test_entry_points_run_to_their_end(ran: dict[str, Any], name: str) -> None:
    for rank in ran[name]["ranks"]:
        assert rank["status"] == "ok", (rank["status"], rank["traceback"][-3000:])
        for phase, found in rank["phases"].items():
            assert not found["complaints"], (phase, found["complaints"])
        assert rank["facts"]["transformer_engine"].startswith("2.")


@pytest.mark.parametrize(
    "name", ["espo", "espo, cp", "espo, dual cache", "espo, fp8", "espo, blocks"]
)
def test_espo_reaches_every_phase(ran: dict[str, Any], name: str) -> None:
    for rank in ran[name]["ranks"]:
        assert set(ESPO_PHASES) <= set(rank["phases"])
        assert rank["phases"]["update"]["entered"] == 2
        assert rank["phases"]["load"]["kernels"] > 0
        assert rank["facts"]["saved_bytes"] > 0
        assert all(rank["phases"][phase]["flops"] > 0 for phase in ("rollout", "ref_elbo"))


def test_adapters_keep_no_reference_and_save_no_base(ran: dict[str, Any]) -> None:
    """In FP8, with tensor and sequence parallelism."""
    for rank, whole in zip(ran["espo, lora"]["ranks"], ran["espo, fp8"]["ranks"], strict=False):
        phases = set(ESPO_PHASES) - {"reference"}
        assert phases <= set(rank["phases"]) and "reference" not in rank["phases"]
        assert rank["phases"]["rollout"]["operations"]["quantize"] > 0
        assert rank["phases"]["ref_elbo"]["flops"] > 0
        # Adapters of rank 4 with their state beside a model of width 64 with a reference.
        assert 0 < rank["facts"]["saved_bytes"] < 0.02 * whole["facts"]["saved_bytes"]
        assert rank["pinned"] < 0.1 * whole["pinned"]


@pytest.mark.parametrize("name", COMPARED)
def test_ranks_agree_in_their_collectives(ran: dict[str, Any], name: str) -> None:
    assert len(ran[name]["ranks"]) == ran[name]["ranks"][0]["facts"]["world_size"] >= 2
    assert ran[name]["trace"] > 20
    assert ran[name]["mismatch"] is None


def test_data_parallel_ranks_are_fed_different_data(ran: dict[str, Any]) -> None:
    first, other = ran["module"]["ranks"][0], ran["module"]["ranks"][1]
    steps = [rank["phases"]["rollout"]["units"]["denoising step"] for rank in (first, other)]
    assert steps[0] != steps[1]
    assert first["phases"]["rollout"]["flops"] != other["phases"]["rollout"]["flops"]


def test_a_plan_whose_ranks_disagree_is_found_with_both_places(ran: dict[str, Any]) -> None:
    """Ranks that ask all others in a rollout, where other copies make other numbers of steps."""
    assert all(rank["status"] == "ok" for rank in ran["disagreeing"]["ranks"])
    mismatch = ran["disagreeing"]["mismatch"]
    assert mismatch is not None
    assert "all_reduce" in mismatch and mismatch.count(".py:") >= 2, mismatch
    assert "ranks 0 and 1 disagree" in mismatch
    assert ran["disagreeing"]["refused"] == f"this plan would hang: {mismatch}."


@pytest.mark.parametrize("name", OK)
def test_what_was_found_is_printed(ran: dict[str, Any], name: str) -> None:
    printed = ran[name]["printed"]
    assert ran[name]["refused"] == ""
    first = ran[name]["ranks"][0]
    assert f"Simulated rank 0 of {first['facts']['world_size']}: ok" in printed
    for phase, found in first["phases"].items():
        if found["kernels"]:
            assert f"  {phase}: peak {found['peak'] / 1e9:.2f} GB" in printed
    training = not name.startswith(("evaluate", "generate"))
    assert ("the plan's arithmetic" in printed) == training
    assert ("tokens/s on all ranks" in printed) == training
    assert ("agree" in printed) == (name in COMPARED)
    for place in list(first["phases"].get("rollout", {"waits": {}})["waits"])[:1]:
        assert f" x: {place}" in printed


@pytest.mark.parametrize(
    "name",
    ["espo", "espo, cp", "espo, dual cache", "espo, fp8", "espo, lora", "espo, blocks", "module"],
)
def test_the_host_waits_for_the_device_where_it_must_only(ran: dict[str, Any], name: str) -> None:
    for rank in ran[name]["ranks"]:
        phases, batches = rank["phases"], rank["facts"]["simulated_micro_batches"]

        def waits(phase: str, phases: Any = phases) -> int:
            return sum(phases[phase]["waits"].values())

        # A denoising step: the tokens that were drawn, and every few steps a look for signals. One
        # that takes in prompts in blocks makes passes of two kinds.
        most = 3 if name == "espo, blocks" else 2
        assert rank["steps"] and all(step["waits"] <= most for step in rank["steps"])
        assert all(step["waits"] <= 2 for step in rank["steps"][1:])
        # ELBO passes: their results, once per update, not once per micro-batch. The reference's
        # weights come and go once each.
        assert batches >= 2
        assert waits("old_elbo") <= 1
        assert waits("ref_elbo") <= 2 + 2
        # Per update, the first one too, the results of its two passes over the micro-batches and
        # the gradient's norm; Transformer Engine makes an empty tensor once.
        assert waits("update: passes") <= 2 * 2 + 1, phases["update: passes"]["waits"]
        assert waits("update") <= 2 * 1, phases["update"]["waits"]


# Megatron waits for the counts of tokens in each mixture.
@pytest.mark.parametrize(
    "name", [name for name in OK if name.startswith("espo") and name != "espo, experts"]
)
def test_an_optimizer_step_waits_for_the_device_five_times_at_most(
    ran: dict[str, Any], name: str
) -> None:
    """With its passes, the check for NaN and the look for signals after it."""
    for rank in ran[name]["ranks"]:
        phases = rank["phases"]
        of_step = {phase: phases[phase]["waits"] for phase in ("update: passes", "update", "stop?")}
        assert phases["update"]["entered"] == 2 and phases["stop?"]["entered"] >= 1
        assert sum(of_step["stop?"].values()) >= 1, "the look was not seen"
        in_all = sum(sum(waits.values()) for waits in of_step.values())
        assert in_all <= 5 * 2, of_step


def test_the_reference_policy_is_pinned_in_its_own_size(ran: dict[str, Any]) -> None:
    for rank in ran["module"]["ranks"]:
        weights = rank["facts"]["weights"]
        # Beside it only what one pass sends to the device.
        assert weights <= rank["pinned"] <= 1.02 * weights + (1 << 20)


def test_fp8_multiplies_in_fp8_and_keeps_no_more_than_bf16_plus_copies(ran: dict[str, Any]) -> None:
    fp8 = ran["espo, fp8"]["ranks"][0]
    assert fp8["phases"]["rollout"]["operations"]["quantize"] > 0
    assert "quantize" not in ran["espo, cp"]["ranks"][0]["phases"]["rollout"]["operations"]


def test_experts_that_do_the_same_leave_the_books_of_experts_run_one_by_one(
    ran: dict[str, Any],
) -> None:
    quick, whole = ran["espo, experts"]["ranks"], ran["espo, experts alone"]["ranks"]
    for one, other in zip(quick, whole, strict=True):
        assert one["status"] == other["status"] == "ok", other["status"]
        # Of the 8 experts of a rank and layer two are run.
        assert one["facts"].pop("experts_repeated") >= 6 * 2
        assert "experts_repeated" not in other["facts"]
        # What the simulation itself takes.
        for measured in ("wall", "host_memory"):
            one.pop(measured), other.pop(measured)
        assert one["phases"].keys() == other["phases"].keys()
        for name, phase in one["phases"].items():
            phase.pop("wall"), other["phases"][name].pop("wall")
            assert phase == other["phases"][name], name
        assert one == other
