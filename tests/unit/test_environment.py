"""Whatever starts a process: CUDA's variables in time, and Transformer Engine found or named."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_espo import device, environment
from megatron_espo.environment import (
    CONNECTIONS,
    Engine,
    check_environment,
    check_ranks,
    set_environment,
)
from megatron_espo.startup import argument_checks, arguments
from megatron_espo.training import espo

ROOT = Path(__file__).parents[2]


class NvmlError(Exception):
    """What NVML raises."""


def nvml(*capabilities: tuple[int, int]) -> Any:
    """A driver with GPUs of these compute capabilities, or none."""

    def start() -> None:
        if not capabilities:
            raise NvmlError

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=start,
        nvmlDeviceGetCount=lambda: len(capabilities),
        nvmlDeviceGetHandleByIndex=lambda index: capabilities[index],
        nvmlDeviceGetCudaComputeCapability=lambda handle: handle,
    )


@pytest.mark.parametrize(
    ("gpus", "given", "argv", "expected"),
    [
        ([], None, [], "1"),
        ([(9, 0)] * 8, None, [], "1"),
        ([(10, 0), (10, 3)], None, [], None),
        ([(10, 0), (9, 0)], None, [], "1"),
        ([(9, 0)], "8", [], "8"),
        ([(10, 0)], "32", [], "32"),
        ([(9, 0)], None, ["--use-torch-fsdp2"], None),
    ],
)
def test_connections_are_what_the_gpus_want_unless_somebody_has_set_them(
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[tuple[int, int]],
    given: str | None,
    argv: Sequence[str],
    expected: str | None,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(*gpus))
    variables = {} if given is None else {CONNECTIONS: given}
    set_environment(variables, argv)
    assert variables.get(CONNECTIONS) == expected


FIRST_QUESTION = """
import os, runpy, sys, torch
def answer(*args, **kwargs):
    print("asked with", os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"), flush=True)
    os._exit(0)
for name in ("is_available", "device_count", "current_device", "get_device_properties",
             "get_device_capability", "init", "_lazy_init"):
    setattr(torch.cuda, name, answer)
kind, name, *sys.argv[1:] = sys.argv[1:]
(runpy.run_path if kind == "path" else runpy.run_module)(name, run_name="__main__")
"""


@pytest.mark.parametrize(
    "start",
    [
        "path examples/run_espo_8b.sh --recipe countdown",
        "path examples/pretrain_8b.sh --dry-run",
        "module megatron_espo.training.pretrain --preset tiny",
        "path tools/generate.py --load x",
        "path tools/convert_hf.py to-megatron --hf x --out y",
        "module benchmarks.gpu_benchmark",
    ],
)
def test_every_start_sets_the_connections_before_cuda_is_asked_anything(start: str) -> None:
    """From an environment that holds none of what the start scripts set."""
    words = ("CUDA", "NVTE", "TORCH", "OMP", "RANK", "WORLD", "MASTER", "LOCAL")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(words)}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_QUESTION, *start.split()],
        cwd=ROOT, env={**clean, "PYTHONPATH": str(ROOT)}, text=True, timeout=120, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "asked with 1", done.stdout[-2000:]


def flags(**given: Any) -> argparse.Namespace:
    usual: dict[str, Any] = {
        "use_torch_fsdp2": False,
        "tensor_model_parallel_size": 2,
        "context_parallel_size": 1,
        "attention_backend": AttnBackend.auto,
        "transformer_impl": "transformer_engine",
        "apply_query_key_layer_scaling": False,
    }
    return argparse.Namespace(**(usual | given))


@pytest.mark.parametrize(
    ("args", "capability", "variables"),
    [
        (flags(), (9, 0), {CONNECTIONS: "1"}),
        (flags(tensor_model_parallel_size=1), (9, 0), {CONNECTIONS: "8"}),
        (flags(), (10, 0), {CONNECTIONS: "32"}),
        (flags(), (10, 0), {}),
        (flags(), None, {CONNECTIONS: "8"}),
        (flags(use_torch_fsdp2=True), (9, 0), {CONNECTIONS: "8"}),
        (flags(), (10, 0), {"NVTE_FLASH_ATTN": "1"}),
        (flags(attention_backend=AttnBackend.fused), (10, 0), {"NVTE_FLASH_ATTN": "0"}),
        (flags(transformer_impl="local"), (10, 0), {"NVTE_APPLY_QK_LAYER_SCALING": "1"}),
    ],
)
def test_variables_that_work_are_accepted(
    args: argparse.Namespace, capability: tuple[int, int] | None, variables: dict[str, str]
) -> None:
    check_environment(args, capability, variables)


@pytest.mark.parametrize(
    ("args", "capability", "variables", "sentence"),
    [
        (flags(), (9, 0), {CONNECTIONS: "8"}, f"{CONNECTIONS} is '8', .* 9.0; unset it"),
        (flags(tensor_model_parallel_size=1, context_parallel_size=2), (8, 0),
         {CONNECTIONS: "8"}, "need 1 on GPUs of compute capability 8.0"),
        (flags(use_torch_fsdp2=True), (10, 0), {CONNECTIONS: "1"}, "-fsdp2 .* set it to 8"),
        (flags(use_torch_fsdp2=True), None, {}, "--use-torch-fsdp2 needs a GPU"),
        (flags(), (10, 0), {"NVTE_FLASH_ATTN": "0"}, "NVTE_FLASH_ATTN is 0, .* choose with"),
        (flags(attention_backend=AttnBackend.fused), (10, 0), {"NVTE_UNFUSED_ATTN": "1"},
         "--attention-backend fused needs 0"),
        (flags(attention_backend=AttnBackend.local), (10, 0), {}, "--transformer-impl local"),
        (flags(), (10, 0), {"NVTE_APPLY_QK_LAYER_SCALING": "1"}, "LAYER_SCALING is 1"),
        (flags(apply_query_key_layer_scaling=True), (10, 0), {}, "LAYER_SCALING is 0"),
    ],
)  # fmt: skip
def test_variables_that_cannot_work_are_named(
    args: argparse.Namespace,
    capability: tuple[int, int] | None,
    variables: dict[str, str],
    sentence: str,
) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_environment(args, capability, variables)


def test_more_ranks_than_gpus_are_refused() -> None:
    check_ranks(8, {"LOCAL_WORLD_SIZE": "8"})
    check_ranks(8, {})
    with pytest.raises(ValueError, match=r"8 ranks on a node where 4 GPUs .* --nproc-per-node 4"):
        check_ranks(4, {"LOCAL_WORLD_SIZE": "8"})


GPU_FLAGS = (
    "--preset tiny --seq-length 48 --lr 1e-3 --espo-train-data train.jsonl --bf16 "
    "--rollout-completion-length 16 --rollout-block-length 8 --rollout-denoising-steps 8 "
    "--espo-prompts-per-rollout 4 --espo-group-size 2 --vocab-size 263 --mask-token-id 256"
).split()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU for all that looks for one before the process groups start, no Transformer Engine."""
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv(CONNECTIONS, "1")
    with_engine(monkeypatch, Engine(None))
    return monkeypatch


def with_engine(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    for module in (environment, device, argument_checks):
        monkeypatch.setattr(module, "transformer_engine", lambda: engine)


def check(*more: str) -> argparse.Namespace:
    """Parse and check as every entry point does before its process groups start."""
    args = arguments._parse([*GPU_FLAGS, *more], arguments.add_arguments)
    arguments._settle_model(args)
    argument_checks.check_layout(args)
    argument_checks.check_backend(args)
    return args


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (Engine(None), "Transformer Engine is not installed; install the package's .gpu. extra"),
        (
            Engine("2.9.0", "OSError: libcudnn.so.9"),
            "2.9.0 is installed but cannot be imported .OSE",
        ),
        (Engine("2.4.0"), "Transformer Engine 2.4.0 is too old; install 2.8 or newer"),
    ],
)
def test_without_transformer_engine_the_advice_is_a_way_out(
    hopper: pytest.MonkeyPatch, engine: Engine, reason: str
) -> None:
    with_engine(hopper, engine)
    with pytest.raises(
        ValueError, match=f"^--transformer-impl .*{reason}.* --transformer-impl local"
    ):
        check()
    args = check("--transformer-impl", "local")
    if not engine.usable:
        assert not args.apply_rope_fusion
    # What the model is built from, with fusions that need no package.
    planned = arguments.plan_arguments(
        [*GPU_FLAGS, "--transformer-impl", "local"], espo.prepare_arguments, world_size=1
    )
    if engine.version is None:
        config = core_transformer_config_from_args(planned)
        assert config.bias_activation_fusion and config.bias_dropout_fusion


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("--tp-comm-overlap", "--tp-comm-overlap: its buffers have one shape"),
        ("--use-te-activation-func", "--use-te-activation-func needs --transformer-impl"),
        ("--te-rng-tracker", "--te-rng-tracker: Transformer Engine is not installed"),
        ("--use-precision-aware-optimizer", "--use-precision-aware-optimizer: Transformer Engine"),
        (
            "--recompute-granularity selective --recompute-modules mlp layernorm",
            "--recompute-modules layernorm: Transformer Engine is not installed",
        ),
        ("--fp8-format hybrid", "--fp8-format needs --transformer-impl transformer_engine"),
        ("--fp4-format e2m1", "--fp4-format e2m1: rows are not padded"),
        ("--use-megatron-fsdp", "--use-megatron-fsdp: its checkpoints"),
        ("--transformer-impl inference_optimized", "its layers cannot be trained"),
    ],
)
def test_what_needs_transformer_engine_is_refused_by_name(
    hopper: pytest.MonkeyPatch, more: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        check("--transformer-impl", "local", *more.split())


def test_flags_of_transformer_engine_are_taken_where_it_is(hopper: pytest.MonkeyPatch) -> None:
    with_engine(hopper, Engine("2.20.2"))
    again = "--recompute-granularity selective --recompute-modules mlp layernorm".split()
    args = check("--use-precision-aware-optimizer", "--te-rng-tracker", *again)
    assert args.transformer_impl == "transformer_engine" and args.apply_rope_fusion


BROKEN = {
    "error": "raise RuntimeError('requires cuDNN 9.12.0 or later\\nand more')",
    "half": "try:\n    from . import pytorch\nexcept ImportError:\n    pass\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_transformer_engine_is_named_and_does_not_stop_runs_without_it(
    tmp_path: Path, kind: str
) -> None:
    """One fails altogether, the other hides that its PyTorch part is missing, as the real one."""
    folder = tmp_path / "transformer_engine"
    folder.mkdir()
    (folder / "__init__.py").write_text(BROKEN[kind])
    if kind == "half":
        (folder / "pytorch.py").write_text("raise ImportError('undefined symbol: nvte')")
    code = (
        "from megatron_espo.training import espo\n"
        "from megatron_espo.environment import transformer_engine\n"
        "from megatron.core.extensions.transformer_engine import HAVE_TE\n"
        "print(HAVE_TE, transformer_engine().problem)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, text=True, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    said = {
        "error": "(RuntimeError: requires cuDNN 9.12.0 or later)",
        "half": "(ImportError: undefined symbol: nvte)",
    }[kind]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("False Transformer Engine") and said in last
