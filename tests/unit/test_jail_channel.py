"""What generated code may say to its tests: nothing but the right value makes a test pass."""

import contextlib
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_espo.sandbox.jail import channel
from megatron_espo.sandbox.jail.judge import run_program, run_test
from megatron_espo.sandbox.run import run_tests
from megatron_espo.sandbox.warm import Limits

NAMES = {"f": "other", "C": "other", "LIMIT": "other", "math": "module math"}


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def framed(message: object) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack("!Q", len(data)) + data


def passes(test: str, said: bytes) -> bool:
    """Whether a test passes against code that has said some bytes and left."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        try:
            return run_test(test, NAMES, ours)
        except (
            EOFError,
            OSError,
            ValueError,
        ):  # as for a process that is gone: the test has failed
            return False


def test_right_value_and_a_normal_end_pass() -> None:
    said = framed({"value": 5}) + framed({"gone": True})
    assert passes("assert f(2) == 5", said)
    assert not passes("assert f(2) == 5", framed({"value": 5}))  # no end
    assert not passes("assert f(2) == 5", framed({"gone": True}) * 2)


def test_a_test_that_catches_everything_is_not_passed_by_leaving_or_by_nonsense() -> None:
    lenient = "try:\n    f(2)\nexcept Exception:\n    pass"
    gone = framed({"gone": True})
    raised = framed({"raised": True})
    assert passes(lenient, raised + framed({"value": True}) + gone)
    assert not passes(lenient, raised + framed({"value": False}) + gone)  # of another kind
    assert not passes(lenient, gone)
    assert not passes(lenient, gone * 2)
    assert not passes(lenient, framed({"check": 1}) + gone)
    assert not passes(lenient, framed(["no object"]) + gone)


def test_nonsense_after_the_right_value_does_not_pass() -> None:
    too_long = struct.pack("!Q", channel.MAX_MESSAGE + 1)
    for said in (too_long, framed(["no object"]), framed({"value": 5})):
        assert not passes("assert f(2) == 5", framed({"value": 5}) + said)


def test_asserts_within_functions_cannot_be_left_out() -> None:
    """They run where the code is; the judge counts them."""
    test = "async def main():\n    assert f(2) == 5\nimport asyncio\nasyncio.run(main())"
    done, gone = framed({"value": None}), framed({"gone": True})
    number = 0
    for number in range(60):
        if passes(test, done * 2 + framed({"check": number}) + framed({"value": 5}) + done + gone):
            break
    assert 0 < number < 59
    assert not passes(test, done * 3 + gone)
    assert not passes(
        test, done * 2 + framed({"check": number}) + framed({"value": 4}) + done + gone
    )


def test_what_says_the_same_of_every_candidate_equals_none() -> None:
    live, gone = framed({"live": True}), framed({"gone": True})
    for answer in ({"value": True}, {"value": False}, {"raised": True}, {"live": True}):
        said = live + gone + framed({"answers": [answer] * 9}) + gone
        assert not passes("assert f(2) == 5", said)
        assert not passes("assert not f(2) != 5", said)


def test_a_program_is_judged_by_its_output_and_status() -> None:
    def judged(answer: object) -> bool:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(framed(answer))
            return run_program({"input": "1", "output": "2\n"}, ours)

    assert judged({"printed": " 2 \n\n", "status": 0})
    for answer in (
        {"printed": "2", "status": 1}, {"printed": "2 3", "status": 0}, {"printed": 2, "status": 0},
        {"status": 0}, {"printed": "2"}, {"printed": "", "status": 0},
        {"printed": "\n2", "status": 0},
    ):  # fmt: skip
        assert not judged(answer), answer


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers().filter(lambda n: n != 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.tuples(
        st.sampled_from(
            ["list", "tuple", "set", "dict", "int", "range", "type", "bytes", "numpy", "deque",
             "Counter", "defaultdict", "Decimal", "datetime"]
        ),
        inner,
    ).map(list),
    max_leaves=5,
)  # fmt: skip
KEYS = ["passed", "test", "loaded", "gone", "raised", "live", "value", "check", "answers",
        "names", "failed", "end", "go"]  # fmt: skip
ERRORS = ["StopIteration", "SystemExit", "KeyboardInterrupt", "EOFError", "AssertionError",
          "GeneratorExit", "ValueError", "OSError", "BaseException", "Unplain"]  # fmt: skip
MESSAGES = (
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4)
    | VALUES.map(lambda value: {"value": value})
    | st.sampled_from(ERRORS).map(lambda name: {"raised": name, "text": ""})
    | st.lists(VALUES.map(lambda v: {"value": v}), min_size=9, max_size=10).map(
        lambda parts: {"answers": parts}
    )
    | VALUES  # no object at all
)
SAID = st.lists(
    MESSAGES.map(framed)
    | st.binary(max_size=20)
    | st.integers(0, 2**64 - 1).map(lambda n: struct.pack("!Q", n)),
    max_size=5,
).map(b"".join)


@settings(max_examples=100, deadline=None)
@given(SAID, st.sampled_from(["", "gone", "end"]))
@example(framed({"test": 0, "passed": True}) * 3, "gone")
@example(framed({"loaded": True}) + framed({"test": 0, "passed": True}), "gone")
@example(framed({"live": True}), "gone")
@example(framed({"live": True}) + framed({"gone": True}) + framed({"value": True}), "gone")
@example(framed({"raised": True}) + framed({"value": 1}), "gone")
@example(framed({"value": float("nan")}), "gone")
@example(framed({"value": "5"}) + framed({"value": 5}), "gone")
@example(b"[" * 40, "gone")
@pytest.mark.parametrize(
    "test",
    [
        "assert f(2) == 5",
        "assert f(2) in (5,) and f(3) in {5}",
        "assert [f(2)] == [5] and C(1).g() == 5",
        "x = [1]\nf(x)\nassert x == [5] and f(2) == 5",
        "assert all(f(n) == 5 for n in range(2)) and f(lambda v: v, 2) == 5",
        "def check(c, n=2):\n    assert c(n) == 5\ncheck(f)",
        "try:\n    f(2)\nexcept KeyError:\n    pass\nelse:\n    raise AssertionError",
    ],
)
def test_nothing_that_code_says_forges_a_pass(test: str, said: bytes, ending: str) -> None:
    if ending:
        said += framed({ending: True})
    assert not passes(test, said)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | SAID)
def test_any_bytes_are_a_message_or_a_value_error_or_the_end(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ValueError):
            message: Any = channel.receive(ours, 1 << 16)
            assert message is None or isinstance(message, dict)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text()), max_size=4))
def test_messages_arrive_whole_and_in_order(messages: list[dict[str, Any]]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for message in messages:
            channel.send(ours, message)
        ours.shutdown(socket.SHUT_WR)
        assert [channel.receive(theirs) for _ in messages] == messages
        assert channel.receive(theirs) is None


def test_a_message_over_the_limit_is_refused_before_it_is_read(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    theirs.sendall(struct.pack("!Q", 101))
    ours.settimeout(5.0)
    with pytest.raises(ValueError, match="101 bytes is too long"):
        channel.receive(ours, 100)
    channel.send(theirs, {"x": "y" * 90})
    assert channel.receive(ours, 100) == {"x": "y" * 90}


@settings(max_examples=8, deadline=None)
@given(SAID, st.booleans())
def test_code_in_the_jail_cannot_write_itself_a_pass(said: bytes, when_called: bool) -> None:
    """The same against real jails, on every file descriptor that the code can find."""
    write = (
        "import os, sys\nfor fd in range(40):\n"
        f"    try: os.write(fd, {said!r})\n    except OSError: pass\n"
    )
    body = "".join(f"    {line}\n" for line in write.splitlines()) if when_called else ""
    program = (write if not when_called else "") + f"def f(x):\n{body}    return 4\n"
    limits = Limits(test_seconds=2.0, total_seconds=3.0)
    assert run_tests([program], ["assert f(2) == 5"], limits) == [False]
