"""Imports point one way; what may read Megatron's global arguments is a short list."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_espo"
# From the bottom up. A part imports from rows below its own, and from its own row.
LAYERS = (
    ("random", "environment", "device", "transfer", "recipes", "config", "diffusion"),
    ("parallel",),
    ("data", "model"),
    ("generation", "tasks", "checkpoint", "monitor", "rl", "evaluation", "plan"),
    ("arguments", "argument_checks"),
    ("training", "doctor", "simulate"),
)
LAYER = {part: number for number, layer in enumerate(LAYERS) for part in layer}
# Within a row, too, these import nothing but what stands here.
ALONE = {
    "random": set(),
    "environment": set(),
    "device": {"environment"},
    "transfer": set(),
    "recipes": set(),
    "config": set(),
    "diffusion": {"random"},
    "tasks": set(),
    "checkpoint": {"data"},
}
PURE = ["diffusion/elbo.py", "diffusion/losses.py", "diffusion/noise.py", "rl/losses.py",
        "rl/kl.py", "rl/advantages.py"]  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    """Names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "megatron_espo":
            yield from (f"megatron_espo.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", [f for f in FILES if f.name != "__init__.py" or len(f.parts) > 1],
                         ids=str)  # fmt: skip
def test_imports_point_down(file: Path) -> None:
    own = file.parts[0].removesuffix(".py")
    for name in imported(PACKAGE / file):
        package, _, rest = name.partition(".")
        part = rest.partition(".")[0]
        if package != "megatron_espo" or part == own:
            continue
        assert LAYER[part] <= LAYER[own], f"{file} imports {name}"
        assert part in ALONE.get(own, {part}), f"{file} imports {name}"


@pytest.mark.parametrize("file", PURE)
def test_mathematics_knows_tensors_only(file: str) -> None:
    allowed = {"torch", "math", "dataclasses", "collections", "typing", "megatron_espo"}
    names = list(imported(PACKAGE / file))
    assert {name.partition(".")[0] for name in names} <= allowed
    assert not [name for name in names if name.startswith("torch.distributed")]


def test_global_arguments_are_read_in_few_places() -> None:
    def reads(file: Path) -> bool:
        return any(
            isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("megatron.training")
            and any(alias.name == "get_args" for alias in node.names)
            for node in ast.walk(ast.parse((PACKAGE / file).read_text("utf-8")))
        )

    readers = {str(file) for file in FILES if reads(file)}
    assert "training/setup.py" in readers
    # device.py seeds Megatron's generators where its own seeding asks for CUDA.
    assert {f for f in readers if not f.startswith("training/")} == {
        "model/provider.py",
        "device.py",
        # Stands in for training's data sets.
        "simulate/hooks.py",
    }
