"""--dry-run of every recipe, what it refuses, and its memory against Megatron's own buffers."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from interpreter import python

from megatron_espo.dry_run.command import planned_world_size

TASKS = ("gsm8k", "math", "countdown", "sudoku", "code")
PARAMETERS = {"llada_8b": 8_015_581_184, "dream_7b": 7_615_616_512}
TINY = "--preset tiny --vocab-size 262 --mask-token-id 256 --dry-run-world-size 4".split()
NODES = {"1": "2", "2": "2", "8": "4"}

REFUSED = {
    "fit": (
        "--tensor-model-parallel-size 1 --dry-run-world-size 1",
        r"does not fit 80 GB; weights, gradients and optimizer take 144\.8 GB: raise --tensor",
    ),
    "activations": (
        "--micro-batch-size 96",
        "does not fit 80 GB; activations take .* lower --micro-batch-size",
    ),
    "rollouts": (
        "--rollout-micro-batch-size 2048 --espo-eval-samples 0",
        "rollouts take .*: lower --rollout-micro-batch-size\\.",
    ),
    "caches": (
        "--rollout-micro-batch-size 512 --rollout-cache dual --espo-eval-samples 0",
        "rollouts take .*: lower --rollout-micro-batch-size or leave out --rollout-cache",
    ),
    "heads": (
        "--recipe dream_7b --tensor-model-parallel-size 8",
        "--num-attention-heads 28 is not divisible by --tensor-model-parallel-size 8",
    ),
    "groups": (
        "--recipe dream_7b --tensor-model-parallel-size 28 --dry-run-world-size 28",
        "--tensor-model-parallel-size 28 exceeds --num-query-groups 4; use at most 4",
    ),
    "ranks": ("--dry-run-world-size 9", "9 ranks cannot be split into"),
    "layers": (
        "--pipeline-model-parallel-size 3 --dry-run-world-size 48",
        "--num-layers 32 is not divisible by --pipeline-model-parallel-size 3",
    ),
    "prompts": (
        "--dry-run-world-size 64",
        "--espo-prompts-per-rollout 16 cannot be split over 32 data-parallel ranks",
    ),
    "rows": ("--micro-batch-size 5", "--micro-batch-size 5 does not divide the 96 rows"),
    "steps": ("--rollout-denoising-steps 100", "cannot be split evenly over 8 blocks"),
    "task": ("--espo-task sudoko", "--espo-task sudoko: no such task"),
    "fp8": (
        "--fp8-format hybrid --transformer-impl local",
        "--fp8-format needs --transformer-impl transformer_engine",
    ),
    "world": ("--dry-run-world-size eight", "--dry-run-world-size eight is no number"),
}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """All plans, from one process: starting one takes longer than any of them."""
    wanted: dict[str, Any] = {
        f"{model}/{task}": ["plan", ["--recipe", model, "--recipe", task]]
        for model in PARAMETERS
        for task in TASKS
    }
    for name, (flags, _) in REFUSED.items():
        wanted[f"refused/{name}"] = ["plan", flags.split()]
    for nodes, tp in NODES.items():
        for model in PARAMETERS:
            flags = f"--recipe {model} --dry-run-world-size {8 * int(nodes)}"
            wanted[f"nodes/{nodes}/{model}"] = [
                "plan", f"{flags} --tensor-model-parallel-size {tp}".split()
            ]  # fmt: skip
    for name, flags in {
        "no-reference": "--espo-kl-coef 0",
        "pipeline": "--pipeline-model-parallel-size 2",
        "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "fp8": "--fp8-format hybrid --fp8-recipe tensorwise",
        "fp8-rollout": "--fp8-format hybrid --espo-fp8-phases rollout",
        "fp8-elbo": "--fp8-format hybrid --espo-fp8-phases elbo",
        "cache": "--rollout-cache dual",
        "cache-pipeline": "--rollout-cache prefix --pipeline-model-parallel-size 2",
        "cache-few": "--rollout-cache dual --espo-eval-samples 40",
        "moments": "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
    }.items():
        wanted[name] = ["plan", flags.split()]
    blocks = "--attention-mask block-causal --block-size 32 --rollout-cache exact"
    wanted["blocks"] = ["plan", blocks.split()]
    wanted["adapt"] = ["plan", [], ["adapt_8b"]]
    wanted["pretrain"] = ["plan", [], ["pretrain_8b"]]
    wanted["sft"] = ["plan", ["--recipe", "dream_7b"], ["llada_8b", "sft_8b"]]
    wanted["dpo"] = ["plan", [], ["llada_8b", "dpo_8b"]]
    pairs = "--dpo-completion-length 512 --dpo-num-mc 4 --dpo-gradient joint"
    wanted["dpo-joint"] = ["plan", pairs.split(), ["llada_8b", "dpo_8b"]]
    wanted["dpo-simulate"] = ["plan", ["--simulate"], ["llada_8b", "dpo_8b"]]
    for tp in ("1", "2"):
        wanted[f"megatron/{tp}"] = ["megatron", [*TINY, "--tensor-model-parallel-size", tp]]
    return make_plans(wanted)


def make_plans(wanted: dict[str, Any]) -> dict[str, Any]:
    """Make plans in a process of their own."""
    done = subprocess.run(
        [python(), str(Path(__file__).with_name("plans.py"))],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.split("RESULTS")[1])
    return found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", PARAMETERS)
def test_every_recipe_can_be_planned(results: dict[str, Any], model: str, task: str) -> None:
    plan = results[f"{model}/{task}"]
    assert plan["printed"].endswith("The plan fits.\n"), plan
    assert plan["parameters"] == PARAMETERS[model]
    assert f"{model}, {PARAMETERS[model]:,} parameters" in plan["printed"]
    assert f"Rollout ({task}): 16 prompts" in plan["printed"]


@pytest.mark.parametrize("name", REFUSED)
def test_plans_that_cannot_work_are_refused_with_the_reason(
    results: dict[str, Any], name: str
) -> None:
    plan = results[f"refused/{name}"]
    assert "refused" in plan, plan["printed"]
    with pytest.raises(ValueError, match=REFUSED[name][1]):
        raise ValueError(plan["refused"])
    assert "The plan fits" not in plan["printed"]


@pytest.mark.parametrize("tp", ["1", "2"])
def test_memory_is_that_of_megatrons_buffers_and_optimizer(
    results: dict[str, Any], tp: str
) -> None:
    """bf16 with the distributed optimizer over 4 (2) data-parallel ranks, padding aside."""
    real = results[f"megatron/{tp}"]
    assert real["weights"] == real["planned_weights"]
    for part in ("gradients", "optimizer"):
        assert real[f"planned_{part}"] <= real[part] <= real[f"planned_{part}"] * 1.001


@pytest.mark.parametrize("model", PARAMETERS)
def test_memory_agrees_with_megatrons_estimate(results: dict[str, Any], model: str) -> None:
    plan = results[f"{model}/gsm8k"]
    memory = plan["memory"]
    ours = memory["weights"] + memory["gradients"] + memory["optimizer"]
    # Megatron's formula leaves out the biases of Dream's q, k and v.
    bytes_per_parameter = 6 + 12 / 4
    biases = 28 * (28 + 2 * 4) * 128 / 2 * bytes_per_parameter if model == "dream_7b" else 0
    assert ours - biases == pytest.approx(plan["theory"], rel=1e-12)


def test_pipeline_stages_hold_the_whole_model(results: dict[str, Any]) -> None:
    plan, whole = results["pipeline"], results["llada_8b/gsm8k"]
    assert plan["parameters"] == PARAMETERS["llada_8b"]
    assert len(plan["stages"]) == 2 and sum(plan["stages"]) == whole["stages"][0]


def test_options_change_the_memory_that_they_are_for(results: dict[str, Any]) -> None:
    plain = results["llada_8b/gsm8k"]["memory"]
    assert plain["reference"] == plain["weights"]
    assert results["no-reference"]["memory"]["host"] == 0.0
    assert "reference ELBO 0.0%" in results["no-reference"]["printed"]
    full = results["full"]["memory"]
    assert full["activations"] < plain["activations"] / 4
    fp8 = results["fp8"]["memory"]
    # All linear weights of the layers: what is neither embedding, head nor norm.
    linear = (PARAMETERS["llada_8b"] - 2 * 126464 * 4096 - (2 * 32 + 1) * 4096) / 2
    assert fp8["quantised"] == 2 * linear and fp8["weights"] == plain["weights"]
    # Without gradients in FP8 nothing asks for the weights along their columns.
    assert results["fp8-rollout"]["memory"]["quantised"] == linear
    assert results["fp8-elbo"]["memory"]["quantised"] == 2 * linear
    assert results["moments"]["memory"]["optimizer"] == plain["optimizer"] * (4 + 2 + 2) / 12


def test_caches_of_rollouts_are_planned(results: dict[str, Any]) -> None:
    """LLaDA-8B at tp 2: 32 rows of 656 positions, keys and values of 16 of 32 heads of 128."""
    per_row = 656 * 2 * 16 * 128 * 2 * 32
    cached = results["cache"]["memory"]
    assert cached["cache"] == 32 * per_row and "key/value caches" in results["cache"]["printed"]
    plain = results["llada_8b/gsm8k"]["memory"]
    assert plain["cache"] == 0.0 and cached["rollout"] == plain["rollout"]
    # What is held all the time, and the larger of what an update and a rollout take.
    assert cached["peak"] == cached["lasting"] + max(
        plain["activations"], cached["rollout"] + cached["cache"]
    )
    assert cached["total"] == cached["peak"] + cached["reserve"]
    # Half the layers; 128 of the 256 evaluated problems for each of two data-parallel ranks are in
    # flight, four micro-batches of 32 of them.
    assert results["cache-pipeline"]["memory"]["cache"] == 4 * 32 * per_row / 2
    # 24 completions of a rollout for each of four ranks, 10 problems of an evaluation.
    assert results["cache-few"]["memory"]["cache"] == 24 * per_row


@pytest.mark.parametrize("model", PARAMETERS)
def test_plans_of_the_documentation(results: dict[str, Any], model: str) -> None:
    """docs/cluster.md shows these numbers."""
    text = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    for nodes in NODES:
        memory = results[f"nodes/{nodes}/{model}"]["memory"]
        peak, optimizer = memory["peak"] / 1e9, memory["optimizer"] / 1e9
        row = next(line for line in text.splitlines() if line.startswith(f"| {nodes} | {model} |"))
        assert f" {optimizer:.1f} " in row and f" {peak:.1f} |" in row, (row, memory)


def test_other_jobs_can_be_planned(results: dict[str, Any]) -> None:
    for name, model in (("pretrain", "llada_8b"), ("sft", "dream_7b")):
        plan = results[name]
        assert plan["parameters"] == PARAMETERS[model], plan
        assert plan["printed"].endswith("The plan fits.\n")
    assert "5,242,880 tokens" in results["pretrain"]["printed"]


def test_preference_optimization_can_be_planned(results: dict[str, Any]) -> None:
    plan, joint = results["dpo"], results["dpo-joint"]
    assert plan["parameters"] == PARAMETERS["llada_8b"], plan
    assert plan["printed"].endswith("The plan fits.\n")
    # Views of a completion, and one copy of the weights on the host.
    step = (
        "64 pairs x 16 views (8 draws of exact_count for each completion) = 32 micro-batches of 8"
    )
    assert step in plan["printed"] and "two_pass; one pass of the reference" in plan["printed"]
    assert plan["memory"]["host"] == pytest.approx(PARAMETERS["llada_8b"], rel=0.01)
    # As many rows, of which half the positions can be read.
    update = joint["memory"]["activations"] / plan["memory"]["activations"]
    assert "16 micro-batches of 8 rows on a data-parallel rank, joint" in joint["printed"]
    assert 0.5 < update < 0.95
    operations = [
        float(re.findall(r"Operations of a step: (\S+):", p["printed"])[0]) for p in (plan, joint)
    ]
    # Twice the draws, five passes in place of four, and as many tokens that are predicted.
    assert operations[0] / operations[1] == pytest.approx(2 * 5 / 4, rel=0.01)
    assert "--simulate: preference optimization" in results["dpo-simulate"]["refused"]


def test_size_of_a_plan_comes_from_flag_torchrun_or_environment() -> None:
    assert planned_world_size([], {}) == 8
    assert planned_world_size([], {"NNODES": "2", "GPUS_PER_NODE": "4"}) == 8
    assert planned_world_size([], {"WORLD_SIZE": "32", "NNODES": "2"}) == 32
    assert planned_world_size([], {"WORLD_SIZE": "1"}) == 8
    assert planned_world_size(["--dry-run-world-size=16"], {"WORLD_SIZE": "32"}) == 16
    with pytest.raises(ValueError, match="NNODES is '-1'"):
        planned_world_size([], {"NNODES": "-1"})


def test_plans_of_block_models_count_the_noisy_copies(results: dict[str, Any]) -> None:
    blocks, plain, cached = (results[name] for name in ("blocks", "llada_8b/gsm8k", "cache"))
    line = "Blocks: block-causal, of 32 tokens; a row of 656 positions passes with 4 noisy copies"
    assert f"{line} beside the clean tokens, 3,280 in all" in blocks["printed"]
    assert "micro-batches of 1 rows" in blocks["printed"]
    # Five rows in place of four, and masks of less than 100 MB.
    grown = blocks["memory"]["activations"] / plain["memory"]["activations"]
    assert 1.1 < grown < 1.3
    assert blocks["memory"]["cache"] == cached["memory"]["cache"] > 0
    adapted = results["adapt"]
    assert adapted["printed"].endswith("The plan fits.\n"), adapted
    assert (
        "of 1 tokens, grown to 32; a row of 8,192 positions passes with 1 noisy copy"
        in (adapted["printed"])
    )
