"""Scaling recipes."""

from enum import Enum
from typing import Any

from transformer_engine.signatures import RECORD, bound


class Format(Enum):
    E4M3 = "E4M3"
    HYBRID = "HYBRID"


class Recipe:
    def __init__(self, **kwargs: Any) -> None:
        self.fp8_format = bound(type(self).__name__, **kwargs).get("fp8_format")


class DelayedScaling(Recipe):
    def __init__(self, **kwargs: Any) -> None:
        # The real class ignores keywords that it does not know, and Megatron passes two.
        known = {k: v for k, v in kwargs.items() if k in RECORD["DelayedScaling"]}
        self.fp8_format = bound("DelayedScaling", **known).get("fp8_format")


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    pass
