"""The dashboard: hardware with a stand-in for NVML, rates, warnings, resumed events."""

import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from megatron_espo.config import EspoConfig, MonitorConfig, RolloutConfig
from megatron_espo.errors import UserError
from megatron_espo.monitor import hardware
from megatron_espo.monitor.dashboard import Dashboard
from megatron_espo.monitor.flops import ModelDimensions, RolloutFlops, forward_flops, rollout_flops
from megatron_espo.monitor.hardware import (
    gather_hardware,
    hardware_scalars,
    local_hardware,
    open_gpu,
)
from megatron_espo.monitor.tensorboard import begin_events, write_histograms, write_layout
from megatron_espo.monitor.throughput import own_peak_tflops, peak_tflops, throughput_scalars
from megatron_espo.monitor.watch import RULES, Watch
from megatron_espo.parallel.layout import Layout
from megatron_espo.rl.scalars import first_ratio_scalars, identical_completions
from megatron_espo.startup.argument_checks import check_wandb


class NvmlError(Exception):
    pass


def stand_in(temperatures: list[int], power: Any = None) -> SimpleNamespace:
    """Stands for pynvml with one GPU of the name GPU-1."""

    def by_uuid(uuid: str) -> str:
        if uuid != "GPU-1":
            raise NvmlError
        return "handle"

    def power_usage(handle: str) -> int:
        if power is None:
            raise NvmlError
        return power

    def temperature(handle: str, sensor: int) -> int:
        assert (handle, sensor) == ("handle", 7)
        return temperatures.pop(0) if len(temperatures) > 1 else temperatures[0]

    return SimpleNamespace(
        NVMLError=NvmlError,
        NVML_TEMPERATURE_GPU=7,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=50),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3 * 2**30),
        nvmlDeviceGetPowerUsage=power_usage,
        nvmlDeviceGetTemperature=temperature,
    )


def test_gpu_readings_are_brought_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in([40, 70, 50], power=350_000))
    gpu = open_gpu("GPU-1", interval=0.01)
    assert gpu is not None
    deadline = time.monotonic() + 20
    while len(gpu._readings) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    reading = gpu.drain()
    # The hottest of several readings, the mean of the others.
    assert reading == {
        "memory_gib": 3.0, "power_watts": 350.0, "temperature_celsius": 70.0,
        "utilization_percent": 50.0,
    }  # fmt: skip
    gpu.close()
    assert gpu.drain()["temperature_celsius"] == 50.0


def test_a_quantity_that_the_gpu_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in([40]))
    gpu = open_gpu("GPU-1", interval=60)
    assert gpu is not None
    assert "power_watts" not in local_hardware(gpu) and "memory_gib" in local_hardware(gpu)
    gpu.close()


@pytest.mark.parametrize("module", [stand_in([1]), None])
def test_without_a_gpu_or_driver_there_is_no_error(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert open_gpu("GPU-2") is None
    monkeypatch.setattr(hardware.device, "has_cuda", lambda: False)
    assert open_gpu() is None
    scalars = gather_hardware(local_hardware(None))
    assert list(scalars) == ["hardware/host_peak_gib"] and scalars["hardware/host_peak_gib"] > 0.05


def test_each_gpu_has_a_curve_until_there_are_too_many() -> None:
    few = hardware_scalars([{"power_watts": 1.0, "host_peak_gib": 5.0}, {"host_peak_gib": 2.0}])
    assert few == {"hardware/gpu0/power_watts": 1.0, "hardware/host_peak_gib": 5.0}
    many = hardware_scalars([{"power_watts": float(rank)} for rank in range(65)])
    assert many == {
        "hardware/gpus/power_watts/mean": 32.0,
        "hardware/gpus/power_watts/min": 0.0,
        "hardware/gpus/power_watts/max": 64.0,
    }


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "16-bit", 989.4),
        ("NVIDIA H100 PCIe", "16-bit", 756.0),
        ("NVIDIA H100 80GB HBM3", "fp8", 1978.9),
        ("NVIDIA H200", "16-bit", 989.4),
        ("NVIDIA H20", "16-bit", 148.0),
        ("NVIDIA A100-SXM4-80GB", "16-bit", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA A10G", "16-bit", None),
        ("NVIDIA GB200", "fp8", 5000.0),
    ],
)
def test_peak_is_that_of_the_device(name: str, precision: Any, peak: float | None) -> None:
    assert peak_tflops(name, precision) == peak


def test_without_a_known_peak_there_is_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.device, "has_cuda", lambda: False)
    assert own_peak_tflops(None, bits16=True, fp8=False) is None
    assert own_peak_tflops(123.0, bits16=False, fp8=False) == 123.0
    flops = RolloutFlops(generation=8e12, old_elbo=1e12, ref_elbo=0.0, update=6e12)
    seconds = {"rollout": 2.0, "old_elbo": 0.5, "update": 1.0, "reward": 9.0}
    rates = throughput_scalars(flops, seconds, 0.5, devices=2, peak=None)
    assert rates == {
        "performance/rollout_tflops": 2.0,
        "performance/elbo_tflops": 1.0,
        "performance/update_tflops": 1.5,
    }
    with_peak = throughput_scalars(flops, seconds, 0.5, devices=2, peak=4.0)
    assert with_peak["performance/rollout_mfu"] == 0.5
    assert with_peak["performance/update_mfu"] == 0.375
    # Sampled before the run was resumed: no time, and no number instead of a division by zero.
    assert list(throughput_scalars(flops, {"update": 1.0}, 0.5, 2, None)) == [
        "performance/update_tflops"
    ]


def test_dashboard_counts_the_runs_own_operations() -> None:
    model = ModelDimensions(2, 64, 96, 4, 2, 16, 262)
    espo, rollout = EspoConfig(), RolloutConfig()
    board = Dashboard(dimensions=model, devices=4, peak=0.5)
    seconds = {"rollout": 2.0, "update": 3.0}
    # Two passes of 10 rows, whole ones of 300 positions and windows of 32, and 4 candidates each.
    work = [10 * 332, 10 * 332 * 300, 10 * 8, 10 * 8 * 300]
    rates = board.throughput(300, espo, rollout, seconds, left_out=[0.0, 0.0], work=work)
    generation = forward_flops(model, 10, 300, 40) + forward_flops(model, 10, 32, 40, keys=300)
    assert rates["performance/rollout_mfu"] == pytest.approx(generation / 2 / 4 / 0.5e12)
    flops = rollout_flops(model, 300, espo, rollout)
    assert rates["performance/update_tflops"] == pytest.approx(flops.update / 4 / 3 / 4 / 1e12)


@pytest.mark.parametrize("peak", [0.0, -1.0, math.inf, math.nan])
def test_a_peak_that_is_no_speed_is_named(peak: float) -> None:
    with pytest.raises(ValueError, match="--monitor-peak-tflops"):
        MonitorConfig(peak_tflops=peak).validate()


def test_first_ratio_is_that_of_the_two_passes(one_rank) -> None:
    layout = Layout(tp=one_rank, pp=one_rank, dp=one_rank, cp=one_rank, mp=one_rank)
    draws = torch.tensor([[-3.0, -5.0], [-2.0, -2.0]])
    name = "policy/ratio_first_update/max_deviation"
    assert first_ratio_scalars(draws, draws.clone(), 8, layout) == {name: 0.0}
    assert first_ratio_scalars(draws, None, 8, layout) == {name: 0.0}
    # The second completion's mean ELBO is 0.4 lower in the pass with gradients.
    again = draws - torch.tensor([[0.1, -0.1], [0.8, 0.0]])
    found = first_ratio_scalars(draws, again, 8, layout)
    assert found == {name: pytest.approx(1 - math.exp(-0.4 / 8), rel=1e-6)}


def test_the_first_ratio_of_tokens_is_the_farthest_one(one_rank) -> None:
    layout = Layout(tp=one_rank, pp=one_rank, dp=one_rank, cp=one_rank, mp=one_rank)
    draws = -torch.rand(2, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    again = draws.clone()
    again[1, 0, 1, 2] += 0.3
    (found,) = first_ratio_scalars(draws, again, 8, layout).values()
    assert found == pytest.approx(math.exp(0.3) - 1, rel=1e-6)


def test_identical_completions_are_those_of_one_group() -> None:
    a, b, c = [1, 2, 3], [1, 2, 4], [9, 9, 9]
    groups = torch.tensor([a, b, a, b, c, a])
    assert identical_completions(groups, 3) == [1, 0, 1, 0, 0, 0]
    assert identical_completions(groups, 6) == [1, 1, 1, 1, 0, 1]


RATIO, SPREAD = "policy/ratio_first_update/max_deviation", "reward/zero_std_groups"
SAME, SPEED = "rollout/identical_completions", "rollout/tokens_per_step"
SAMPLES = "policy/effective_sample_size"
NOISE, KL, NORM = "elbo/mc_variance_per_token", "policy/kl_per_token", "policy/grad_norm"


def warned(scalar: str, values: list[float]) -> list[bool]:
    watch = Watch()
    name = next(rule.name for rule in RULES if rule.scalar == scalar)
    return [bool(watch.look({scalar: v}).scalars[f"warnings/{name}"]) for v in values]


@pytest.mark.parametrize(
    ("scalar", "healthy", "bad"),
    [
        (RATIO, [0.0, 1e-6, 0.0], [1e-3]),
        (SPREAD, [1.0, 0.5, 1.0, 0.5, 1.0, 1.0, 1.0], [1.0]),
        (NOISE, [0.01, 0.05] * 6, [0.31]),
        (KL, [0.0, 1e-5, 1e-3, 0.02, 0.1, 0.2, 0.3, 0.2, 0.3, 0.2, 0.4], [2.1]),
        (KL, [0.01] * 10, [0.6]),
        (NORM, [0.1, 50.0, 0.1], [math.nan]),
        (SAME, [1.0, 0.5, 1.0, 0.5, 1.0, 1.0, 1.0], [1.0]),
        (SPEED, [1.0, 1.2] * 6, [1.7]),
        (SAMPLES, [1.0, 0.98, 0.6], [0.4]),
    ],
)
def test_warnings_come_with_what_is_wrong_and_not_before(
    scalar: str, healthy: list[float], bad: list[float]
) -> None:
    found = warned(scalar, healthy + bad)
    assert found == [False] * (len(found) - 1) + [True]


def test_a_warning_is_said_once_and_again_after_it_has_passed() -> None:
    watch = Watch()
    values = [0.0, 0.1, 0.1, 0.1, 0.0, 0.1]
    said = [watch.look({RATIO: value}).messages for value in values]
    assert [len(each) for each in said] == [0, 1, 0, 0, 0, 1]
    assert "off 1 by 1.00e-01" in said[1]["ratio_at_first_update"]
    assert watch.look({"reward/mean": 1.0}) == ({}, {})


def test_a_resumed_run_warns_like_an_undisturbed_one() -> None:
    values = [0.01, 0.02] * 8 + [0.5, 0.5, 0.01, 0.4]
    whole = Watch()
    expected = [whole.look({NOISE: value}) for value in values]
    assert sum(len(found.messages) for found in expected) == 2
    for cut in range(len(values)):
        first = Watch()
        before = [first.look({NOISE: value}) for value in values[:cut]]
        second = Watch(first.state())
        assert before + [second.look({NOISE: value}) for value in values[cut:]] == expected
        assert len(second.state()["elbo_variance"]) <= 32


def test_dashboard_writes_and_prints_a_warning_on_the_reporting_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        board = Dashboard(writer=writer, is_reporter=True)
        for step in (1, 2):
            board.report({RATIO: 0.5}, step)
    assert capsys.readouterr().out.count("warning: step 1: the importance ratio") == 1
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("warnings/ratio_at_first_update")] == [1.0, 1.0]
    (text,) = events.Tensors("warnings/ratio_at_first_update/text_summary")
    assert text.step == 1 and b"off 1" in text.tensor_proto.string_val[0]
    Dashboard(watch=Watch()).report({RATIO: 0.5}, 1)
    assert capsys.readouterr().out == ""


def test_histograms_show_ratios_near_one_and_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    ratios = np.append(np.linspace(0.999, 1.001, 60), [math.nan, math.inf])
    with SummaryWriter(str(tmp_path)) as writer:
        write_histograms(writer, {"policy/ratio": ratios, "empty": [math.nan]}, 3)
        write_histograms(None, {"policy/ratio": ratios}, 3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (histogram,) = events.Histograms("policy/ratio")
    assert events.Tags()["histograms"] == ["policy/ratio"]
    values = histogram.histogram_value
    assert values.num == 60 and sum(count > 0 for count in values.bucket) >= 25


def test_a_resumed_run_shows_every_point_once(tmp_path: Path) -> None:
    def work(start: int, end: int, mark: float) -> None:
        with SummaryWriter(str(tmp_path)) as writer:
            begin_events(writer, start)
            write_layout(writer)
            for step in range(start + 1, end + 1):
                writer.add_scalar("s", mark, step)
                writer.add_text("t", str(mark), step)
                write_histograms(writer, {"h": [mark, mark + 1]}, step)

    work(0, 3, 0.0)
    time.sleep(1.1)  # event files are read in the order of the seconds in their names
    work(2, 4, 1.0)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("s")] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert [e.step for e in events.Histograms("h")] == [1, 2, 3, 4]
    assert [e.histogram_value.min for e in events.Histograms("h")] == [0, 0, 1, 1]
    # Text, and the layout of the charts, of which TensorBoard takes the last: as its server reads.
    server = plugin_event_accumulator.EventAccumulator(str(tmp_path))
    server.Reload()
    assert [e.step for e in server.Tensors("t/text_summary")] == [1, 2, 3, 4]
    last = server.Tensors("custom_scalars__config__")[-1]
    layout = layout_pb2.Layout.FromString(last.tensor_proto.string_val[0])
    assert [c.title for c in layout.category] == [
        "Reward", "Policy", "ELBO", "Rollout", "Performance", "Hardware"
    ]  # fmt: skip


class Wandb:
    """Keeps what the module wandb would be given."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def Histogram(self, np_histogram: tuple[Any, Any]) -> tuple[Any, Any]:
        return np_histogram


def test_weights_and_biases_gets_what_tensorboard_gets() -> None:
    wandb = Wandb()
    board = Dashboard(wandb=wandb)
    board.report({"policy/grad_norm": 0.5, "reward/mean": 0.25}, 3)
    board.histograms({"reward": np.array([0.0, 1.0, 1.0, np.nan]), "none": np.array([])}, 4)
    (step, numbers), (later, histograms) = wandb.logged
    assert (step, later) == (3, 4)
    assert numbers["policy/grad_norm"] == 0.5 and numbers["reward/mean"] == 0.25
    assert any(name.startswith("warnings/") for name in numbers)
    counts, edges = histograms.pop("histograms/reward")
    assert counts.sum() == 3 and counts[-1] == 2 and (edges[0], edges[-1]) == (0.0, 1.0)
    assert not histograms


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "--wandb-project needs --wandb-exp-name"),
        ({"wandb_exp_name": "a"}, "--wandb-save-dir or --save; pass one"),
    ],
)
def test_what_weights_and_biases_needs_is_named(flags: dict[str, str], said: str) -> None:
    known = {"wandb_project": "p", "wandb_exp_name": "", "wandb_save_dir": "", "save": None}
    with pytest.raises(UserError, match=said):
        check_wandb(Namespace(**(known | flags)))
    check_wandb(Namespace(**(known | {"wandb_project": ""})))
