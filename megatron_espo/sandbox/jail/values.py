"""Plain values as JSON, so that nothing but data passes between code and its tests.

What arrives is rebuilt from built-in types: an object whose ``__eq__`` always says yes, a subclass
or a pickle cannot get through.
"""

import builtins
import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

_MAX_DEPTH, _MAX_ITEMS = 60, 200_000
_SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter,
}  # fmt: skip
_TEXTS: dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": complex,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "Decimal": Decimal,
    "Fraction": Fraction,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
}
_WRITERS: tuple[tuple[type, Callable[[Any], str]], ...] = (
    (complex, str), (bytes, bytes.hex), (bytearray, bytearray.hex), (Decimal, str),
    (Fraction, str), (datetime.datetime, datetime.datetime.isoformat),
    (datetime.date, datetime.date.isoformat),
)  # fmt: skip
_CONTAINERS: tuple[type, ...] = (list, tuple, set, frozenset)
_SMALL = 1 << 60


def encode(value: Any, foreign: Callable[[Any], Any] | None = None, depth: int = 0) -> Any:
    """Turn a value into what JSON can hold.

    Args:
        value: numbers, texts, containers of such, and iterators, which are used up.
        foreign: what to do with anything else.
        depth: containers around the value.

    Returns:
        Its JSON form.

    Raises:
        ValueError: the value is too deep, too large, or of another kind and ``foreign`` is None.
    """
    if depth > _MAX_DEPTH:
        raise ValueError("a value is nested too deeply")
    found = _encode_plain(value)
    if found is not value or value is None or isinstance(value, str | int):
        return found
    if isinstance(value, Mapping):
        pairs = [[encode(k, foreign, depth + 1), encode(v, foreign, depth + 1)]
                 for k, v in _limited(value.items())]  # fmt: skip
        return ["dict", pairs]
    for kind in _CONTAINERS:
        if isinstance(value, kind):
            return [kind.__name__, [encode(v, foreign, depth + 1) for v in _limited(value)]]
    if hasattr(value, "tolist"):  # numpy
        return encode(value.tolist(), foreign, depth + 1)
    if isinstance(value, Iterator):
        return ["iterator", [encode(v, foreign, depth + 1) for v in _limited(value)]]
    if isinstance(value, Iterable) and not isinstance(value, type) and foreign is None:
        return ["list", [encode(v, foreign, depth + 1) for v in _limited(value)]]
    name = getattr(value, "__name__", None)
    if isinstance(name, str) and getattr(builtins, name, None) is value:
        return ["builtin", name]
    if foreign is None:
        raise ValueError(f"a {type(value).__name__} is no plain value")
    return foreign(value)


def _encode_plain(value: Any) -> Any:
    """Encode what holds nothing else; other values are returned as they are."""
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__int__(value)
        return number if -_SMALL < number < _SMALL else ["int", hex(number)]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    for kind, text in _WRITERS:
        if isinstance(value, kind):
            return [kind.__name__, text(value)]
    return value


def _limited(values: Any) -> Iterator[Any]:
    for count, value in enumerate(values):
        if count >= _MAX_ITEMS:
            raise ValueError("a value has too many items")
        yield value


def decode(value: Any, foreign: Callable[[str, Any], Any] | None = None) -> Any:
    """Rebuild a value from its JSON form.

    Args:
        value: from :func:`encode`, perhaps of somebody not to be trusted.
        foreign: rebuilds what the other side's ``foreign`` wrote, from its kind and content.

    Returns:
        The value, of built-in types.

    Raises:
        ValueError: it is not such a form.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)):
        raise ValueError("a value is malformed")
    kind, content = value
    try:
        if kind in _SEQUENCES:
            return _SEQUENCES[kind]([decode(v, foreign) for v in content])
        if kind == "dict":
            return {decode(k, foreign): decode(v, foreign) for k, v in content}
        if kind in _TEXTS:
            return _TEXTS[kind](content)
        if kind == "range":
            return range(*content)
        if kind == "builtin" and foreign is not None:
            return getattr(builtins, content)
    except (TypeError, ArithmeticError, AttributeError, RecursionError) as error:
        raise ValueError("a value is malformed") from error
    if foreign is None:
        raise ValueError(f"a value of the kind {kind} is malformed")
    return foreign(kind, content)
