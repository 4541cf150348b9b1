"""The GPU benchmark runs on a CPU, too, and says what it does not have there."""

import json
import os
import subprocess
from pathlib import Path

from interpreter import python

ROOT = Path(__file__).parents[2]
SMALL = (
    "--preset tiny --layers 2 --rows 4 --rollout-rows 2 --prompt 8 --completion 16 --block 8 "
    "--steps 8 --timed-steps 2 --repeats 1"
).split()


def test_benchmark_runs_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = subprocess.run(
        [python(), "-m", "benchmarks.gpu_benchmark", *SMALL, "--out", str(out)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, timeout=560, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("not available (Transformer Engine needs a GPU") == 3
    report = json.loads(out.read_text())
    assert [row["what"] for row in report["rows"]] == ["ELBO", "ELBO + gradient", "rollout"]
    for row in report["rows"]:
        assert row["precision"] == "bf16" and row["peak_gib"] is None
        # More layers take longer, and what they take longer is work.
        assert row["extrapolated_seconds"] >= row["seconds"] > 0
        assert 0 < row["tflops"] < 10
    assert report["rows"][2]["tokens_per_second"] > 0
    assert report["matmul_tflops"]["bf16"] > 0 and report["matmul_tflops"]["float8"] is None
    assert list(report["elbo_per_token"]) == ["bf16 - float32"]
    assert 0 < report["elbo_per_token"]["bf16 - float32"]["max"] < 0.05
