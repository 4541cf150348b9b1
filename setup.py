"""Package metadata. Versions are ranges that were tried; megatron-core's minor version is pinned,
because its entry points change between minor versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_espo/__init__.py").read_text())
assert VERSION is not None

TEST = [
    "hypothesis>=6.100",
    "peft>=0.18",
    "pyarrow>=17",
    "mypy>=1.10",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.6",
]

setup(
    name="megatron-espo",
    version=VERSION.group(1),
    description="Masked-diffusion language models on Megatron-Core: pre-training, SFT and ESPO",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_espo", "megatron_espo.*"]),
    install_requires=[
        "torch>=2.8",
        "megatron-core[training]==0.19.*",
        "transformers>=5.0",
        "tokenizers>=0.21",
        "safetensors>=0.4",
        "math-verify[antlr4_13_2]==0.9.*",
        "tensorboard>=2.16",
        "nvidia-ml-py>=12.535",
        "numpy>=1.26",
        "matplotlib>=3.8",
        "pillow>=10",
        "rich>=13",
    ],
    extras_require={
        "data": ["huggingface_hub>=0.30", "pyarrow>=17"],
        "gpu": ["transformer-engine[pytorch]>=2.8"],
        "test": TEST,
    },
)
