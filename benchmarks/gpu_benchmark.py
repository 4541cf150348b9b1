"""What one GPU does with a model's layers: speed and memory of ELBOs and rollouts, error of FP8.

    python -m benchmarks.gpu_benchmark --preset llada_8b

builds four layers with embedding and output head, measures them in bf16 and in each FP8 recipe
that the GPU runs, and extrapolates to all layers of the preset from the time of half of the layers.
``--layers 32`` measures the whole model. With ``--load FOLDER`` besides it takes a checkpoint's
weights: only these tell what FP8 does to a trained model. Flags that ``--help`` does not list go to
Megatron. Without a GPU it runs with Megatron's local layers and without FP8; on a GPU without
Transformer Engine, ``--transformer-impl local`` does the same.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_espo import device

device.prepare()

import torch  # noqa: E402

from benchmarks.gpu_model import (  # noqa: E402
    build,
    computing_in,
    float32_copy,
    free_gradients,
    layers_of,
    usable_recipes,
)
from benchmarks.gpu_passes import (  # noqa: E402
    Row,
    elbo_passes,
    matmul_ceiling,
    rollout_pass,
    views_of,
)
from megatron_espo.model.fp8 import STATELESS_RECIPES  # noqa: E402
from megatron_espo.model.handle import DiffusionModel  # noqa: E402
from megatron_espo.model.presets import PRESETS  # noqa: E402
from megatron_espo.rl.elbo import elbo_of_views  # noqa: E402
from megatron_espo.startup.setup import run_entry_point  # noqa: E402

# Dense peaks of the data sheets in TFLOP/s, (bf16, FP8), by a part of the device's name; the first
# that fits counts.
DATA_SHEETS = {
    "H100 PCIe": (756.0, 1513.0),
    "H100 NVL": (835.0, 1671.0),
    "H100": (989.0, 1979.0),
    "H200": (989.0, 1979.0),
    "B200": (2250.0, 4500.0),
    "A100": (312.0, None),
}
CLIP_RANGES = {"LLaDA": 0.2, "Dream": 4e-4}


def main(argv: Sequence[str]) -> None:
    """Measure and print.

    Args:
        argv: flags.
    """
    options, rest = parse(argv)
    recipes, reasons = usable_recipes(options.recipes, rest)
    model, all_layers = build(options, recipes, rest)
    print(f"device: {device_name()}; layers built: {len(layers_of(model))} of {all_layers}")
    for recipe, reason in reasons.items():
        print(f"FP8 {recipe}: not available ({reason})")
    precisions = ["bf16", *recipes]
    ceilings = {p: matmul_ceiling(p, model, options) for p in ["bf16", "float8"]}
    rows = []
    for precision in precisions:
        with computing_in(model, precision):
            for size in options.rows:
                rows += elbo_passes(model, precision, size, all_layers, options)
            for size in options.rollout_rows:
                rows.append(rollout_pass(model, precision, size, all_layers, options))
    free_gradients(model)
    deviations = elbo_deviations(model, precisions, options)
    print_speed(rows, ceilings)
    print_deviations(deviations)
    if options.out:
        report = {
            "device": device_name(),
            "torch": torch.__version__,
            "layers_built": len(layers_of(model)),
            "layers": all_layers,
            "matmul_tflops": ceilings,
            "rows": [asdict(row) for row in rows],
            "elbo_per_token": deviations,
            "not_available": reasons,
        }
        Path(options.out).write_text(json.dumps(report, indent=1))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the benchmark's own flags from Megatron's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", default="llada_8b", choices=PRESETS)
    parser.add_argument("--layers", type=int, default=4, help="layers to build; even")
    parser.add_argument("--recipes", nargs="*", default=list(STATELESS_RECIPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16], help="rows of an ELBO pass")
    parser.add_argument("--rollout-rows", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--block", type=int, default=32, help="tokens of a block")
    parser.add_argument("--steps", type=int, default=128, help="denoising steps of a rollout")
    parser.add_argument("--timed-steps", type=int, default=6, help="of them, the ones timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="JSON file for the figures")
    options, rest = parser.parse_known_args(argv)
    if options.layers < 2 or options.layers % 2:
        parser.error("--layers must be even: half of them are measured, too")
    return options, rest


def elbo_deviations(
    model: DiffusionModel, precisions: Sequence[str], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Compare ELBOs per token, of the same masks: mean and largest distance from each other."""
    for chunk in model.chunks:
        chunk.eval()
    views, batches = views_of(model, max(options.rows), options)
    elbos = {}
    for precision in precisions:
        with computing_in(model, precision):
            elbos[precision] = elbo_of_views(model, batches, views) / options.completion
    exact = float32_copy(model)
    elbos["float32"] = elbo_of_views(exact, batches, views) / options.completion
    result = {}
    for name in precisions:
        for other in ("float32", "bf16"):
            if name != other:
                distance = (elbos[name] - elbos[other]).abs()
                result[f"{name} - {other}"] = {
                    "mean": float(distance.mean()),
                    "max": float(distance.max()),
                }
    return result


def device_name() -> str:
    """The GPU's name, or CPU."""
    return torch.cuda.get_device_name() if device.has_cuda() else "CPU"


def print_speed(rows: Sequence[Row], ceilings: dict[str, float | None]) -> None:
    """Print the table of speeds, as Markdown."""
    sheet = next((v for k, v in DATA_SHEETS.items() if k in device_name()), (None, None))
    for name, value, peak in zip(("bf16", "float8"), ceilings.values(), sheet, strict=True):
        print(f"plain matrix products, {name}: {number(value)} TFLOP/s, data sheet {number(peak)}")
    print(
        "\n| pass | precision | rows | s | TFLOP/s | all layers, s | all layers, TFLOP/s | of the "
        "matrix products | of the data sheet | tokens/s | peak GiB |\n" + "|---" * 11 + "|"
    )
    for row in rows:
        place = int(row.precision != "bf16")
        shares = [
            None if top is None else 100 * row.extrapolated_tflops / top
            for top in (list(ceilings.values())[place], sheet[place])
        ]
        print(
            f"| {row.what} | {row.precision} | {row.rows} | {row.seconds:.4f} | "
            f"{number(row.tflops)} | {row.extrapolated_seconds:.4f} | "
            f"{number(row.extrapolated_tflops)} | {number(shares[0], '%')} | "
            f"{number(shares[1], '%')} | {number(row.tokens_per_second)} | "
            f"{number(row.peak_gib)} |"
        )


def print_deviations(deviations: dict[str, dict[str, float]]) -> None:
    """Print how far ELBOs per token are from each other, and what part of the clip ranges it is."""
    heads = "".join(
        f" max / clip range {value:g} ({name}) |" for name, value in CLIP_RANGES.items()
    )
    print(f"\n| ELBO per token | mean | max |{heads}\n" + "|---" * (3 + len(CLIP_RANGES)) + "|")
    for name, value in deviations.items():
        shares = "".join(f" {value['max'] / clip:.2g} |" for clip in CLIP_RANGES.values())
        print(f"| {name} | {value['mean']:.2e} | {value['max']:.2e} |{shares}")


def number(value: float | None, unit: str = "") -> str:
    """Write a number, or that there is none."""
    return "not available" if value is None else f"{value:.3g}{unit}"


if __name__ == "__main__":
    run_entry_point(main)
