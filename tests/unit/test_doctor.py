"""The doctor's findings: one sentence per problem, and a status that can be trusted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_espo.doctor import (
    GB,
    Finding,
    Gpu,
    check_gpus,
    check_limits,
    check_nccl,
    check_network,
    check_sandbox,
    check_shared_memory,
    check_transformer_engine,
    check_versions,
)

H100 = Gpu("NVIDIA H100 80GB HBM3", 85 * GB, (9, 0))
A100 = Gpu("NVIDIA A100-SXM4-80GB", 85 * GB, (8, 0))
V100 = Gpu("Tesla V100", 32 * GB, (7, 0))
GOOD = {"torch": "2.15.0+cu130", "megatron-core": "0.19.2", "transformers": "5.23.0"}


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_good_versions_are_fine() -> None:
    assert levels(check_versions((3, 12), GOOD)) == ["ok"] * 4
    assert (
        levels(check_versions((3, 13), GOOD | {"torch": "2.9.0a0+50eac811a6.nv25.09"}))
        == ["ok"] * 4
    )


@pytest.mark.parametrize(
    ("python", "versions", "text"),
    [
        ((3, 11), {}, "Python 3.11 is too old; use Python 3.12"),
        ((3, 12), {"megatron-core": "0.18.0"}, "megatron-core 0.18.0 is not supported; pip"),
        ((3, 12), {"megatron-core": "0.190.0"}, "megatron-core 0.190.0 is not supported"),
        ((3, 12), {"torch": "2.5.1"}, "torch 2.5.1 is not supported; pip install 'torch>=2.8'"),
        ((3, 12), {"transformers": None}, "transformers is not installed; pip install"),
    ],
)
def test_versions_that_do_not_work_are_problems(
    python: tuple[int, int], versions: dict[str, str | None], text: str
) -> None:
    problems = [f for f in check_versions(python, GOOD | versions) if f.level == "problem"]
    assert len(problems) == 1 and problems[0].text.startswith(text)


def test_gpus_are_a_problem_only_where_they_are_wanted() -> None:
    assert levels(check_gpus([], None, True)) == ["warning"]
    for gpus in ([], [H100] * 7):
        (problem,) = check_gpus(gpus, 8, False)
        assert problem.level == "problem" and f"{len(gpus)} of 8 GPUs" in problem.text
        assert "built without CUDA" in problem.text and "--gpus all" in problem.text
    (fine,) = check_gpus([H100] * 8, 8, True)
    assert fine == Finding("ok", f"8 x {H100.name}, 85 GB, compute capability 9.0")
    assert levels(check_gpus([H100, A100], 2, True)) == ["ok", "ok", "warning"]
    assert "no bf16" in check_gpus([V100], 1, True)[-1].text


def test_fp8_needs_transformer_engine_and_the_gpu() -> None:
    (fine,) = check_transformer_engine("2.8.0", None, [H100])
    assert fine.level == "ok" and "FP8 can be used" in fine.text
    engine, fp8 = check_transformer_engine("2.8.0", None, [H100, A100])
    assert (engine.level, fp8.level) == ("ok", "warning") and "--fp8-format" in fp8.text
    assert levels(check_transformer_engine(None, None, [H100])) == ["problem"]
    (broken,) = check_transformer_engine("2.8.0", "OSError: libcudnn", [H100])
    assert broken.level == "problem" and "libcudnn" in broken.text
    assert levels(check_transformer_engine(None, None, [])) == ["ok"]
    assert levels(check_nccl(None, [H100])) == ["problem"]
    assert levels(check_nccl(None, [])) == levels(check_nccl("2.27.3", [H100])) == ["ok"]


def test_dockers_shared_memory_is_too_small_for_several_gpus() -> None:
    (problem,) = check_shared_memory(64 * 10**6, 8)
    assert problem.level == "problem" and "--ipc=host" in problem.text
    assert levels(check_shared_memory(64 * 10**6, 1)) == ["warning"]
    assert levels(check_shared_memory(8 * GB, 8)) == ["ok"]
    assert levels(check_shared_memory(None, 0)) == ["warning"]


def test_addresses_and_interfaces_that_do_not_exist_are_named() -> None:
    assert "problem" not in levels(check_network({}, ["lo", "eth0"], []))
    wrong = {"MASTER_ADDR": "no-such-host.invalid", "RDZV_ENDPOINT": "other.invalid:29400",
             "NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "^docker"}  # fmt: skip
    problems = [f.text for f in check_network(wrong, ["lo", "eth0"], []) if f.level == "problem"]
    assert len(problems) == 3
    assert problems[0].startswith("MASTER_ADDR no-such-host.invalid has no address")
    assert problems[1].startswith("RDZV_ENDPOINT other.invalid has no address")
    assert problems[2].startswith("NCCL_SOCKET_IFNAME is ib0, but the interfaces here are lo, eth0")
    right = {"MASTER_ADDR": "localhost", "NCCL_SOCKET_IFNAME": "ib,eth"}
    assert "problem" not in levels(check_network(right, ["lo", "ib1"], ["mlx5_0"]))
    assert levels(check_network(right, ["ib1"], [])).count("warning") == 0
    loopback = [f for f in check_network(right | {"NNODES": "2"}, ["ib1"], [])
                if "MASTER_ADDR localhost is 127" in f.text]  # fmt: skip
    assert levels(loopback) == ["warning"]


def test_limits_matter_where_they_are_reached() -> None:
    assert check_limits(65536, 65536, infiniband=False) == []
    assert "memlock=-1" in check_limits(65536, 65536, infiniband=True)[0].text
    assert check_limits(None, 65536, infiniband=True) == []
    assert "ulimit -n" in check_limits(None, 1024, infiniband=True)[0].text


def test_sandbox_is_named_and_missed_where_none_works() -> None:
    assert check_sandbox("sandbox: limits only") == [
        Finding("ok", "sandbox: limits only (--espo-task code)")
    ]
    (missing,) = check_sandbox(None)
    assert missing.level == "warning" and "install bubblewrap" in missing.text


def doctor(*arguments: str, status: int) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_espo.doctor", *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_the_command_checks_this_machine_and_starts_what_follows() -> None:
    done = doctor("--then", "echo", "started", status=0)
    assert done.stdout == "started\n"
    assert "warning  no GPU is visible" in done.stderr and "megatron-core 0.19" in done.stderr
    assert "ok       sandbox: " in done.stderr


def test_the_command_stops_at_a_problem() -> None:
    done = doctor("--gpus", "8", "--then", "echo", "started", status=1)
    assert not done.stdout and "problem  0 of 8 GPUs are visible" in done.stderr
