"""The image installs what the package needs; what can be checked of it without Docker."""

import importlib.metadata
import re
from pathlib import Path

import pytest

DOCKERFILE = (Path(__file__).parents[2] / "Dockerfile").read_text("utf-8")
# Of NVIDIA's image, where they must stay.
IN_THE_IMAGE = {"torch", "numpy", "transformer-engine"}


def requirements() -> list[str]:
    """What the package and its extras for data and GPUs ask for, without those of its tests."""
    found = importlib.metadata.requires("megatron-espo") or []
    others = re.compile("test|harness")
    return [
        each.split(";")[0].strip() for each in found if not others.search(each.partition(";")[2])
    ]


@pytest.mark.parametrize("requirement", requirements())
def test_every_requirement_is_installed_as_the_package_asks_or_in_the_image(
    requirement: str,
) -> None:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    name = found.group()
    if name in IN_THE_IMAGE:
        assert f"{name}>" not in DOCKERFILE and f"{name}=" not in DOCKERFILE
        return
    version = requirement.rpartition("]")[2].removeprefix(name)
    assert re.search(rf'"{re.escape(name)}(\[[^"]*\])?{re.escape(version)}"', DOCKERFILE), (
        requirement
    )


def test_base_is_pinned_and_the_user_is_not_root() -> None:
    assert re.search(r"^ARG BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", DOCKERFILE, re.M)
    users = re.findall(r"^USER (\S+)$", DOCKERFILE, re.M)
    assert users and users[-1] not in ("root", "0")
    assert f"useradd --create-home --uid 1001 {users[-1]}" in DOCKERFILE


def test_the_machine_is_checked_before_the_command() -> None:
    entry = DOCKERFILE.split("ENTRYPOINT", 1)[1].splitlines()[0]
    assert '"megatron_espo.doctor", "--then"]' in entry
