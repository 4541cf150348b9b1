"""Plain values as JSON: what the code's process may say about the result of an expression.

A value is plain if it is made of standard types *exactly*: a subclass, an object of the code's own
class, a function or an iterator is none, so that no behaviour of the code's travels with it. Arrays
and scalars of numpy's are plain, too. What arrives is rebuilt from those types and can be compared
without asking the code anything.
"""

import base64
import builtins
import datetime
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

_MAX_DEPTH = 60
_SMALL = 1 << 60
_SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset,
}  # fmt: skip
_MAPPINGS: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "dict": dict, "Counter": Counter, "OrderedDict": OrderedDict,
}  # fmt: skip
# Each with how it is written and read.
_TEXTS: dict[type, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    complex: (repr, complex),
    bytes: (lambda value: base64.b64encode(value).decode(), base64.b64decode),
    bytearray: (
        lambda value: base64.b64encode(value).decode(),
        lambda text: bytearray(base64.b64decode(text)),
    ),
    Decimal: (str, Decimal),
    Fraction: (str, Fraction),
    datetime.datetime: (datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    datetime.date: (datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: (datetime.time.isoformat, datetime.time.fromisoformat),
}
_READERS = {kind.__name__: read for kind, (_, read) in _TEXTS.items()}
_NAMED = {kind: name for name, kind in vars(builtins).items() if isinstance(kind, type)}


class NotPlainError(ValueError):
    """A value is not made of standard types, or is too deep."""


def encode(value: Any, depth: int = 0) -> Any:
    """Turn a plain value into what JSON can hold.

    Args:
        value: of standard types, or of numpy's.
        depth: containers around it.

    Returns:
        Its JSON form.

    Raises:
        NotPlainError: it is not plain, or nested more than 60 deep.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int:
        return value if -_SMALL < value < _SMALL else ["int", hex(value)]
    if depth > _MAX_DEPTH:
        raise NotPlainError("a value is nested too deeply")
    name = kind.__name__
    if _SEQUENCES.get(name) is kind:
        return [name, _encode_items(value, depth)]
    if _MAPPINGS.get(name) is kind:
        return [name, _encode_pairs(value, depth)]
    if kind in _TEXTS:
        return [name, _TEXTS[kind][0](value)]
    if kind is range:
        return ["range", [encode(part) for part in (value.start, value.stop, value.step)]]
    if kind is datetime.timedelta:
        return ["timedelta", [value.days, value.seconds, value.microseconds]]
    if kind is deque:
        return ["deque", [_encode_items(value, depth), value.maxlen]]
    if kind is defaultdict:
        factory = value.default_factory
        return ["defaultdict", [_encode_pairs(value, depth), encode(factory)]]
    if kind is type and value in _NAMED:
        return ["type", _NAMED[value]]
    return _encode_numpy(value)


def _encode_items(values: Any, depth: int) -> list[Any]:
    items = list(values)
    kinds = set(map(type, items))
    if kinds <= {str, float, bool, type(None)}:
        return items
    if kinds == {int} and min(items) > -_SMALL and max(items) < _SMALL:
        return items
    return [encode(item, depth + 1) for item in items]


def _encode_pairs(value: Any, depth: int) -> list[Any]:
    return [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in dict.items(value)]


def _encode_numpy(value: Any) -> Any:
    numpy = sys.modules.get("numpy")
    kind = type(value)
    if numpy is not None and kind.__module__ == "numpy":
        array = numpy.asarray(value)
        scalar = kind is getattr(numpy, kind.__name__, None) and kind is not numpy.ndarray
        if (scalar or kind is numpy.ndarray) and array.dtype.kind in "biufcSU":
            data = base64.b64encode(array.tobytes()).decode()
            return ["numpy", [array.dtype.str, None if scalar else list(array.shape), data]]
    raise NotPlainError(f"a {kind.__name__} is no plain value")


def decode(value: Any) -> Any:
    """Rebuild a value from its JSON form.

    Args:
        value: from :func:`encode`, perhaps of somebody not to be trusted.

    Returns:
        The value, of standard types.

    Raises:
        ValueError: it is not such a form.
    """
    if value is None or isinstance(value, bool | str | int | float):
        return value
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)):
        raise ValueError("a value is malformed")
    try:
        return _decode(*value)
    except (TypeError, ArithmeticError, AttributeError, RecursionError, LookupError) as error:
        raise ValueError("a value is malformed") from error


def _decode(kind: str, content: Any) -> Any:
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](map(decode, content))
    if kind in _MAPPINGS:
        return _MAPPINGS[kind](_decode_pairs(content))
    if kind in _READERS:
        return _READERS[kind](content)
    match kind:
        case "int":
            return int(content, 16)
        case "range":
            return range(*map(decode, content))
        case "timedelta":
            return datetime.timedelta(*content)
        case "deque":
            return deque(map(decode, content[0]), content[1])
        case "defaultdict":
            return defaultdict(decode(content[1]), _decode_pairs(content[0]))
        case "type":
            found = getattr(builtins, content)
            if isinstance(found, type):
                return found
        case "numpy":
            return _decode_numpy(*content)
    raise ValueError("a value is malformed")


def _decode_pairs(content: Any) -> dict[Any, Any]:
    return {decode(key): decode(value) for key, value in content}


def _decode_numpy(kind: str, shape: Any, data: str) -> Any:
    """Rebuild an array, or a scalar where there is no shape."""
    try:
        import numpy
    except ImportError as error:
        raise ValueError("a value needs numpy, which is not installed") from error
    dtype = numpy.dtype(kind)
    if dtype.kind not in "biufcSU":
        raise ValueError("a value is malformed")
    flat = numpy.frombuffer(base64.b64decode(data), dtype)
    return flat[0] if shape is None else flat.reshape(shape).copy()
