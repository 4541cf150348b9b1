"""Imports point one way; what may read Megatron's global arguments is a short list."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_espo"
# The rooms and single files from the bottom up. Each imports only from those before it.
FLOORS = (
    # What needs neither Megatron nor, most of it, torch.
    "errors", "console", "command_line", "environment", "random", "transfer", "recipes",
    "rollout_config", "config", "json_lines", "own_code",
    # The machine, and what Megatron needs to run on it.
    "megatron_patches", "device",
    "diffusion", "objectives", "parallel", "data", "passes", "adapters", "model", "generation",
    "sandbox", "tasks", "rewards", "checkpoint",
    "monitor", "evaluation", "plan", "startup", "conversion", "rl", "supervised", "preference",
    "dry_run", "training", "commands", "api", "simulate", "doctor", "__main__",
)  # fmt: skip
FLOOR = {part: number for number, part in enumerate(FLOORS)}
# These import nothing but what stands here, though there is more below them.
ALONE = {
    "errors": set(),
    "console": {"errors"},
    "command_line": {"errors"},
    "environment": {"errors"},
    "random": {"errors"},
    "transfer": {"errors"},
    "recipes": {"errors"},
    "rollout_config": {"errors"},
    "config": {"rollout_config", "errors"},
    "device": {"environment", "megatron_patches", "errors"},
    "diffusion": {"random", "errors"},
    "json_lines": {"errors"},
    "own_code": {"errors"},
    # Functions of tensors: what they are computed from comes from above.
    "objectives": {"diffusion", "random", "own_code", "config", "rollout_config", "errors"},
    "sandbox": {"errors"},
    "tasks": {"sandbox", "json_lines", "own_code", "errors"},
    # Processes that must start fast and hold nothing of a trainer.
    "rewards": {"tasks", "sandbox", "errors"},
    "checkpoint": {"data", "errors", "model", "conversion"},
    # So that evaluating a pre-trained model loads no trainer.
    "evaluation": set(FLOORS[: FLOORS.index("evaluation")]),
}
PURE = [
    "diffusion/estimators.py", "diffusion/token_loss.py", "diffusion/noise.py",
    *(str(f.relative_to(PACKAGE)) for f in sorted((PACKAGE / "objectives").glob("*.py"))),
]  # fmt: skip


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
        assert FLOOR[part] < FLOOR[own], f"{file} imports {name}"
        assert part in ALONE.get(own, {part}), f"{file} imports {name}"


@pytest.mark.parametrize("file", PURE)
def test_mathematics_knows_tensors_only(file: str) -> None:
    allowed = {"torch", "math", "dataclasses", "collections", "typing", "megatron_espo"}
    if file == "objectives/__init__.py" or file == "objectives/advantages.py":
        allowed |= {"functools", "inspect"}  # finding them by name
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
    assert readers == {
        # Where Megatron calls us and hands over no settings: its own interfaces.
        "model/provider.py",
        "supervised/forward_step.py",
        "training/pretrain.py",
        # The entry points and what they share.
        "startup/setup.py",
        "training/own_loop.py",
        "rl/state.py",
        # Seeds Megatron's generators where its own seeding asks for CUDA.
        "megatron_patches.py",
        # Stands in for training's data sets.
        "simulate/hooks.py",
    }
