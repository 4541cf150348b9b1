"""Values of the code's process arrive as what they are, or are refused."""

import contextlib
import json
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import time, timedelta
from enum import IntEnum
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_espo.sandbox.jail.values import NotPlainError, decode, encode


class Color(IntEnum):
    RED = 1


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary(max_size=9) | st.decimals(allow_nan=False) | st.fractions() | st.dates(),
    lambda inner: st.lists(inner, max_size=4)
    | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    | st.sets(st.integers() | st.text(), max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(PLAIN)
def test_values_arrive_as_they_were(value: object) -> None:
    back = decode(encode(value))
    assert back == value and type(back) is type(value)


STANDARD = [
    Counter("aab"), deque([1, 2], maxlen=3), OrderedDict(a=1), defaultdict(list, {1: [2]}),
    defaultdict(None), timedelta(days=1, microseconds=3), time(1, 2), range(1, 9, 2), 3 + 4j,
    bytearray(b"x"), frozenset([(1, "a")]), int, ValueError, [1, 2.5, None, "x"], 2**70, [2**70, 1],
    list(range(300_000)), "\ud800", float("inf"), [float("-inf")], {(1, 2): {3}},
]  # fmt: skip


@pytest.mark.parametrize("value", STANDARD, ids=lambda value: type(value).__name__)
def test_standard_types_arrive_as_they_are(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value and type(back) is type(value)
    if isinstance(value, deque):
        assert back.maxlen == value.maxlen
    if isinstance(value, defaultdict):
        assert back.default_factory is value.default_factory


ARRAYS = [numpy.arange(6.0).reshape(2, 3), numpy.float64(0.1), numpy.int32(4), numpy.bool_(True),
          numpy.array(["a", "bc"]), numpy.zeros((0, 2))]  # fmt: skip


@pytest.mark.parametrize("value", ARRAYS, ids=lambda value: type(value).__name__)
def test_arrays_arrive_as_they_are(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert type(back) is type(value) and back.dtype == value.dtype
    numpy.testing.assert_array_equal(back, value, strict=True)


class Own(list):
    def tolist(self) -> list[int]:
        return [1]


DEEP: list[Any] = []
for _ in range(100):
    DEEP = [DEEP]
LOOP: list[Any] = []
LOOP.append(LOOP)
NOT_PLAIN = [Own(), namedtuple("P", "x")(1), Color.RED, lambda: 0, len, iter([1]), object(), Own,
             {"a": Own()}, [1, Own()], {1: 2}.keys(), ValueError("x"), DEEP, LOOP, json,
             numpy.array([object()])]  # fmt: skip


@pytest.mark.parametrize("value", NOT_PLAIN, ids=lambda value: type(value).__name__)
def test_what_has_a_behaviour_of_its_own_is_not_plain(value: object) -> None:
    with pytest.raises(NotPlainError):
        encode(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)


@settings(max_examples=150, deadline=None)
@given(
    JSON
    | st.tuples(
        st.sampled_from(
            [
                "int",
                "dict",
                "set",
                "range",
                "type",
                "bytes",
                "Decimal",
                "deque",
                "numpy",
                "timedelta",
            ]
        ),
        JSON,
    ).map(list)
)
def test_malformed_values_are_value_errors(value: object) -> None:
    with contextlib.suppress(ValueError):
        decode(value)
