"""The plan's memory against runs of the same flags on simulated GPUs.

The numbers are live bytes of tensors, counted while the entry point ran with every GPU tensor
replaced by one without memory: ``examples/run_espo_8b.sh FLAGS --dry-run --simulate`` does that.
Countdown, LLaDA-8B's shape with 4 layers on 8 GPUs (tp 2, dp 4, distributed optimizer, sequence
parallelism, four rows of 656 positions) unless the flags say otherwise. Nothing here has been
measured on a GPU.

Formulas were worked out on the rows of SEEN; the others were compared afterwards.
"""

from typing import Any, NamedTuple

import pytest
from test_dry_run import make_plans

MB = 1e6
COMMON = (
    "--num-layers 4 --espo-num-rollouts 1 --espo-updates-per-rollout 2 --rollout-denoising-steps 8 "
    "--espo-prompts-per-rollout 4 --espo-eval-samples 4 --dry-run-gpu-memory 200"
).split()
LOCAL = "--transformer-impl local --no-rope-fusion"
SELECTIVE = "--recompute-granularity selective --recompute-modules mlp layernorm"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers"
# Simulated with the sampling of the tasks' recipes.
PLAIN = "--rollout-block-length 32 --rollout-remasking low_confidence --rollout-top-p 1"
DREAM = f"--recipe dream_7b --num-layers 4 {PLAIN}"
PP2 = "--pipeline-model-parallel-size 2"
VP2 = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"
NO_SP = "--sequence-parallel"


class Row(NamedTuple):
    """A simulated run of one rank: its flags, most megabytes of each phase, and its stage."""

    flags: str
    update: float
    rollout: float
    save: float | None = None
    stage: int = 0
    without: tuple[str, ...] = ()


SEEN = {
    "tp2 dp4": Row("", 9768, 6956),
    "cp2": Row("--context-parallel-size 2", 9455, 6956),
    "first of pp2": Row(PP2, 6893, 4109, 7733),
    "last of pp2": Row(PP2, 6551, 4077, 8862, 1),
    "first of vp2": Row(VP2, 7292, 4093),
    "local": Row(LOCAL, 10064, 6971),
    "mlp again": Row(SELECTIVE, 9425, 6956),
    "core again": Row("--recompute-activations", 9832, 6956),
    "layers again": Row(f"{FULL} 1", 9380, 6956),
    "dual cache": Row("--rollout-cache dual", 9768, 7052),
    "no fusion": Row("--no-gradient-accumulation-fusion", 10001, 6956),
}
HELD_OUT = {
    "32 layers": Row("--num-layers 32", 42372, 28331),
    "no sequence parallelism": Row("", 9925, 7004, without=(NO_SP,)),
    "no overlap": Row(
        "", 9754, 6950, 13611, without=("--overlap-grad-reduce", "--overlap-param-gather")
    ),
    "saved": Row("", 9754, 6950, 10303),
    "tp1 dp8": Row(
        "--tensor-model-parallel-size 1 --espo-prompts-per-rollout 8", 16565, 12923, 17190
    ),
    "tp4": Row("--tensor-model-parallel-size 4", 6371, 4093),
    "last of vp2": Row(VP2, 6767, 4109, 8229, 1),
    "8 layers, first of pp2": Row(f"{PP2} --num-layers 8", 10198, 5854),
    "dream": Row(DREAM, 10382, 7452),
    "local dream": Row(f"{DREAM} {LOCAL}", 10678, 7461),
    "local, no sequence parallelism": Row(LOCAL, 10189, 7003, without=(NO_SP,)),
    "2 rows": Row("--micro-batch-size 2", 9369, 6956),
    "8 rows": Row("--micro-batch-size 8", 10629, 6956),
    "block of layers again": Row(
        "--recompute-granularity full --recompute-method block --recompute-num-layers 2", 9508, 6956
    ),
    "pairs of layers again": Row(f"{FULL} 2 --num-layers 8", 13315, 10009),
    "temperature": Row("--rollout-temperature 0.7 --espo-prompts-per-rollout 16", 9768, 7681),
    "middle of pp4": Row("--pipeline-model-parallel-size 4 --num-layers 8", 5426, 2489, 5945, 1),
    "dream, tp4 cp2": Row(
        f"{DREAM} --tensor-model-parallel-size 4 --context-parallel-size 2", 6601, 4420
    ),
    "mlp again, last of pp2": Row(
        f"{PP2} --num-layers 8 --micro-batch-size 8 --recompute-granularity selective "
        "--recompute-modules mlp",
        9720,
        5838,
        12809,
        1,
    ),
    "2 rows, first of vp2": Row(f"{VP2} --num-layers 8 --micro-batch-size 2", 9877, 5854, 10361),
    "8 rows, layers again": Row(
        f"{FULL} 1 --micro-batch-size 8 --num-layers 8", 13863, 10058, without=(NO_SP,)
    ),
    "16 rows sampled": Row(
        "--espo-prompts-per-rollout 16 --rollout-micro-batch-size 16", 9768, 7359
    ),
}
ROWS = SEEN | HELD_OUT

FP8 = "--fp8-format hybrid --num-layers 4"
# Whole jobs, all held out: recipes, flags, most megabytes of any phase, and by how much the plan
# may be above. Training is planned for micro-batches with every position masked.
JOBS = {
    "pre-training": (["pretrain_8b"], "--num-layers 4", 11690, 0.03),
    "fine-tuning": (["dream_7b", "sft_8b"], "--num-layers 4", 12340, 0.05),
    "tensorwise": (["llada_8b", "countdown"], f"{FP8} --fp8-recipe tensorwise", 11180, 0.03),
    "blockwise": (["llada_8b", "countdown"], f"{FP8} --fp8-recipe blockwise", 11180, 0.03),
    "tensorwise, cp2": (
        ["llada_8b", "countdown"],
        "--fp8-format hybrid --num-layers 8 --context-parallel-size 2 "
        "--tensor-model-parallel-size 1",
        27220,
        0.03,
    ),
}


@pytest.fixture(scope="module")
def plans() -> dict[str, Any]:
    """Plans of all rows, from one process."""
    return make_plans(
        {
            name: [
                "plan",
                [*COMMON, *row.flags.split()],
                ["llada_8b", "countdown"],
                row.without,
            ]
            for name, row in ROWS.items()
        }
        | {
            name: ["plan", [*flags.split(), "--dry-run-gpu-memory", "200"], recipes]
            for name, (recipes, flags, *_) in JOBS.items()
        }
    )


def memory_of(plans: dict[str, Any], name: str) -> dict[str, float]:
    plan = plans[name]
    assert "refused" not in plan, plan
    memory: dict[str, float] = plan["by_stage"][ROWS[name].stage]
    return memory


@pytest.mark.parametrize("name", ROWS)
def test_peak_of_an_update_is_the_simulated_one(plans: dict[str, Any], name: str) -> None:
    memory, simulated = memory_of(plans, name), ROWS[name].update * MB
    lasting, passing = memory["lasting"], memory["activations"]
    assert lasting + passing == pytest.approx(simulated, rel=0.005)
    # What lasts is most of it in so few layers: what passes through them is held to account, too.
    assert passing == pytest.approx(
        simulated - lasting, rel=0.07 if name == "block of layers again" else 0.035
    )


@pytest.mark.parametrize("name", ROWS)
def test_peak_of_a_rollout_is_the_simulated_one(plans: dict[str, Any], name: str) -> None:
    memory = memory_of(plans, name)
    # Before the first optimizer step: no moments, and no buffers of a backward pass.
    gradient_buffers = memory["buffers"] if "local" in name else 33.6 * MB
    lasting = memory["weights"] + memory["gradients"] + memory["optimizer"] / 3 + gradient_buffers
    planned = lasting + memory["rollout"] + memory["cache"]
    assert planned == pytest.approx(ROWS[name].rollout * MB, rel=0.015)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.save])
def test_peak_of_a_checkpoint_is_the_simulated_one(plans: dict[str, Any], name: str) -> None:
    """The state of all data-parallel ranks is gathered in each of them."""
    memory, row = memory_of(plans, name), ROWS[name]
    assert row.save is not None
    assert memory["lasting"] + memory["others"] == pytest.approx(row.save * MB, rel=0.01)
    peak = max(row.save, row.update, row.rollout)
    assert memory["peak"] == pytest.approx(peak * MB, rel=0.03)


@pytest.mark.parametrize("name", JOBS)
def test_peak_of_a_job_is_the_simulated_one(plans: dict[str, Any], name: str) -> None:
    *_, simulated, above = JOBS[name]
    assert "refused" not in plans[name], plans[name]
    ratio = plans[name]["memory"]["peak"] / (simulated * MB)
    assert 0.97 < ratio < 1 + above


def test_fp8_updates_are_the_simulated_ones(plans: dict[str, Any]) -> None:
    for name, simulated in (("tensorwise", 10560), ("blockwise", 10590)):
        memory = plans[name]["memory"]
        assert memory["lasting"] + memory["activations"] == pytest.approx(simulated * MB, rel=0.01)


def test_model_is_built_with_its_weights_in_two_places(plans: dict[str, Any]) -> None:
    for name, simulated in (("tp2 dp4", 7634), ("tp1 dp8", 15268), ("32 layers", 32063)):
        assert memory_of(plans, name)["build"] == pytest.approx(simulated * MB, rel=1e-3)
