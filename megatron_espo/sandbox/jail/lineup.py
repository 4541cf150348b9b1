"""Values like another one, among which an object of the code's has to tell the right one.

An object of the code's own class is compared by that class, in the code's process. It is asked
about the expected value and about others in random order: one that equals everything is found out,
and one that looks for the expected value does not know which of them it is.
"""

import datetime
import itertools
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from random import SystemRandom
from typing import Any

_random = SystemRandom()
_TRIES, _ITEMS = 20, 50


def line_up(value: Any, operator: str, others: int = 8) -> tuple[list[Any], int]:
    """Hide a value among others.

    Args:
        value: expected by the test.
        operator: what is to be done with it, "Eq" or "In" for example.
        others: how many others.

    Returns:
        The values in random order, and where the right one is.
    """
    change = _all_others if operator in ("In", "NotIn") else other
    values = [change(value) for _ in range(others)]
    if change is other and type(value) in (list, tuple, dict):
        # An item of the code's that equals everything shows where that item is another.
        keys = list(value) if isinstance(value, dict) else range(len(value))
        values += [_with(value, key, other(value[key])) for key in itertools.islice(keys, _ITEMS)]
    place = _random.randrange(len(values) + 1)
    values.insert(place, value)
    return values, place


def other(value: Any) -> Any:
    """Return a value of the same kind that is not equal, drawn at random."""
    for _ in range(_TRIES):
        found = _change(value)
        if found != value:
            return found
    return f"not {_random.random()}"


def _change(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case None:
            return _random.choice([0, 1, "", "None", False])
        case int() | Fraction() | Decimal() | complex():
            return value + _random.choice([-1, 1]) * _random.randint(1, 9)
        case float():
            return value + _random.choice([-1.0, 1.0]) * _random.randint(1, 9)
        case str():
            return _changed_items(value, lambda _: _random.choice("abcdefghijklmnopqrstuvwxyz"), "")
        case list():
            return _changed_items(value, other, [])
        case tuple():
            return _changed_items(value, other, ())
        case set() | frozenset():
            item = _random.choice(list(value)) if value else None
            return (value - {item}) | {other(item)}
        case dict():
            key = _random.choice(list(value)) if value else 0
            return {**value, key: other(value.get(key))}
        case bytes():
            return value + bytes([_random.randrange(256)])
        case datetime.date():
            return value + datetime.timedelta(days=_random.choice([-1, 1]) * _random.randint(1, 9))
    return f"not {_random.random()}"


def _with(value: Any, key: Any, item: Any) -> Any:
    """Return a copy of a container with one item replaced."""
    if isinstance(value, dict):
        return {**value, key: item}
    return type(value)([*value[:key], item, *value[key + 1 :]])


def _changed_items(value: Any, change: Callable[[Any], Any], empty: Any) -> Any:
    """Change, drop or repeat an item of a sequence."""
    if not len(value):
        return empty + type(empty)([0]) if not isinstance(empty, str) else change("")
    at, how = _random.randrange(len(value)), _random.randrange(4)
    before, item, after = value[:at], value[at : at + 1], value[at + 1 :]
    if how == 0:
        return before + after
    if how == 1:
        return before + item + item + after
    changed = change(item[0])
    return before + (changed if isinstance(value, str) else type(empty)([changed])) + after


def _all_others(values: Any) -> Any:
    """Return a container of the same kind without any of its items."""
    if isinstance(values, str):
        return "".join(chr(ord(part) + _random.randint(1, 3)) for part in values)
    items = [other(item) for item in values]
    kept = [item for item in items if item not in values]
    if isinstance(values, dict):
        return dict.fromkeys(kept)
    return type(values)(kept) if isinstance(values, list | tuple | set | frozenset) else kept
