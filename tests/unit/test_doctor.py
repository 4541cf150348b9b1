"""The doctor's findings: one sentence per problem, and a status that can be trusted."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_espo.doctor.finding import GB, Finding, Gpu
from megatron_espo.doctor.machine import (
    check_gpus,
    check_limits,
    check_network,
    check_sandbox,
    check_shared_memory,
)
from megatron_espo.doctor.software import (
    Driver,
    check_compiler,
    check_connections,
    check_cudnn,
    check_driver,
    check_kernels,
    check_nccl,
    check_transformer_engine,
    check_versions,
)
from megatron_espo.environment import CONNECTIONS, OLDEST_ENGINE, Engine

H100 = Gpu("NVIDIA H100 80GB HBM3", 85 * GB, (9, 0))
A100 = Gpu("NVIDIA A100-SXM4-80GB", 85 * GB, (8, 0))
B200 = Gpu("NVIDIA B200", 190 * GB, (10, 0))
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
    (fine,) = check_transformer_engine(Engine("2.8.0"), [H100])
    assert fine.level == "ok" and "FP8 can be used" in fine.text
    engine, fp8 = check_transformer_engine(Engine("2.8.0"), [H100, A100])
    assert (engine.level, fp8.level) == ("ok", "warning") and "--fp8-format" in fp8.text
    assert levels(check_transformer_engine(Engine(None), [H100])) == ["problem"]
    (broken,) = check_transformer_engine(Engine("2.8.0", "OSError: libcudnn"), [H100])
    assert broken.level == "problem" and "libcudnn" in broken.text
    assert levels(check_transformer_engine(Engine(None), [])) == ["ok"]
    assert levels(check_nccl(None, [H100])) == ["problem"]
    assert levels(check_nccl(None, [])) == levels(check_nccl("2.27.3", [H100])) == ["ok"]


@pytest.mark.parametrize("version", ["2.7.0+abc", "1.13", "2.7.1"])
def test_transformer_engine_must_be_as_new_as_the_gpu_extra_asks(version: str) -> None:
    (old,) = check_transformer_engine(Engine(version), [H100])
    assert old.level == "problem" and "is too old; install 2.8 or newer" in old.text
    for fine in ("2.8.0", "2.20.2", "2.10.0+8cba1b4", "3.0"):
        assert levels(check_transformer_engine(Engine(fine), [H100])) == ["ok"]
    asked = [r for r in importlib.metadata.requires("megatron-espo") or [] if "transformer" in r]
    assert any(f"transformer-engine[pytorch]>={OLDEST_ENGINE[0]}.{OLDEST_ENGINE[1]};" in
               r.replace(" ", "") for r in asked)  # fmt: skip


def test_cudnn_is_as_new_as_transformer_engine_asks() -> None:
    assert check_cudnn(91300, [H100]) == [Finding("ok", "cuDNN 9.13.0")]
    assert levels(check_cudnn(91200, [H100])) == ["ok"]
    (warned,) = check_cudnn(91002, [H100])
    assert warned.level == "warning" and "cuDNN 9.10.2 is old" in warned.text
    (refused,) = check_cudnn(8907, [H100])
    assert refused.level == "problem" and "cuDNN 8.9.7 is old" in refused.text
    assert levels(check_cudnn(None, [H100])) == ["problem"]
    assert check_cudnn(None, []) == []


def test_driver_must_know_the_cuda_that_pytorch_was_built_for() -> None:
    new, old = Driver("580.65.06", (13, 0), 8), Driver("550.54", (12, 4), 8)
    assert check_driver(new, "13.2", [H100]) == [
        Finding("ok", "driver 580.65.06 for CUDA 13.0, PyTorch built for CUDA 13.2")
    ]
    assert levels(check_driver(new, "12.8", [H100])) == ["ok"]
    (problem,) = check_driver(old, "13.0", [])
    assert problem.level == "problem" and "update the driver or install" in problem.text
    # With NVIDIA's compatibility libraries it runs all the same.
    assert levels(check_driver(old, "13.0", [H100])) == ["ok"]
    (other,) = check_driver(new, None, [])
    assert other.level == "warning" and "this PyTorch has no CUDA" in other.text
    assert check_driver(None, "13.0", []) == []


def test_pytorch_must_hold_kernels_for_the_gpu() -> None:
    built = ["sm_80", "sm_86", "sm_90", "compute_90"]
    assert check_kernels(built, [H100, A100, Gpu("Ada", GB, (8, 9)), B200]) == []
    (missing,) = check_kernels(["sm_80", "sm_90a"], [H100, B200, B200])
    assert missing.level == "problem" and "compute capability 10.0" in missing.text
    assert levels(check_kernels(["sm_80"], [V100])) == ["problem"]


def test_connections_are_left_to_the_run_or_fit_the_gpus() -> None:
    assert check_connections({CONNECTIONS: "8"}, []) == []
    for given, gpus in (({}, [H100]), ({CONNECTIONS: "1"}, [H100]), ({CONNECTIONS: "32"}, [B200])):
        assert levels(check_connections(given, gpus)) == ["ok"]
    (warned,) = check_connections({CONNECTIONS: "32"}, [B200, H100])
    assert warned.level == "warning" and "unset it" in warned.text


def test_compiler_is_missed_only_with_a_gpu() -> None:
    assert check_compiler("gcc", [H100]) == check_compiler(None, []) == []
    assert levels(check_compiler(None, [H100])) == ["warning"]


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
