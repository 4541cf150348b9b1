"""The GPU benchmark with FP8, through the stand-in."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from conftest import TE, forget
from megatron.core import mpu
from transformer_engine.pytorch import quantization as te_fp8

sys.path.append(str(Path(__file__).parents[2]))

SMALL = (
    "--preset tiny --layers 2 --rows 4 --rollout-rows 2 --prompt 8 --completion 16 --block 8 "
    "--steps 8 --timed-steps 2 --repeats 1"
).split()


def test_benchmark_measures_every_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import gpu_benchmark, gpu_model

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    one_rank: Any = lambda args: mpu.initialize_model_parallel(1, 1)  # noqa: E731
    monkeypatch.setattr(gpu_model, "initialize_process_groups", one_rank)
    forget()
    te_fp8.calls.clear()
    out = tmp_path / "out.json"
    gpu_benchmark.main([*SMALL, *TE, "--out", str(out)])
    forget()
    report = json.loads(out.read_text())
    recipes = {"tensorwise", "blockwise", "mxfp8"}
    assert {row["precision"] for row in report["rows"]} == {"bf16"} | recipes
    assert {row["what"] for row in report["rows"]} == {"ELBO", "ELBO + gradient", "rollout"}
    assert all(row["tflops"] > 0 for row in report["rows"]) and len(report["rows"]) == 12
    assert {name for _, name in te_fp8.calls} == {
        None, "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling",
    }  # fmt: skip
    deviations = report["elbo_per_token"]
    bf16 = deviations["bf16 - float32"]["mean"]
    assert bf16 > 0
    for recipe in recipes:
        assert bf16 < deviations[f"{recipe} - float32"]["mean"] < 0.1
        assert 0 < deviations[f"{recipe} - bf16"]["max"] < 0.1
