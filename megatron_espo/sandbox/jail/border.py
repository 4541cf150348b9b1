"""The code's process as the judge has it: what a test's snippets are asked and answered over."""

import socket
import types
from typing import Any

from .channel import MAX_MESSAGE, receive, send
from .lineup import line_up
from .parsed import Parsed
from .split import Split
from .values import NotPlainError, decode, encode

_FEWEST_ALIKE = 4


class ControlError(BaseException):
    """Ends a run of a test, whatever exceptions the test catches."""


class FailedError(ControlError):
    """The test has failed."""


class AgainError(ControlError):
    """A value was not plain: the test's marks have changed, and it has to run anew."""


class RaisedError(Exception):
    """The code's process raised an exception, which is kept there."""


class MalformedError(ControlError, ValueError):
    """The code's process says what makes no sense."""


class Jail:
    """The code's process, seen from a test.

    Args:
        code: to the code's process.
        split: the test.
        parsed: where marks are made.
        space: names that the test finds.
    """

    def __init__(
        self, code: socket.socket, split: Split, parsed: Parsed, space: dict[str, Any]
    ) -> None:
        self.passed: set[int] = set()
        self.space = {
            "__name__": "__main__", "__jail__": self, "__control__": ControlError,
            "__raised__": RaisedError, **space,
        }  # fmt: skip
        self._code, self._split, self._parsed = code, split, parsed
        self._ended = False
        self._conditions: dict[int, types.CodeType] = {}

    # What split tests call.

    def run(self, snippet: int, env: dict[str, Any]) -> None:
        """Execute a statement."""
        self._ask("run", snippet, env)

    def value(self, at: int, env: dict[str, Any], args: dict[str, Any], number: int) -> Any:
        """Return the plain value of an expression."""
        answer = self._ask("value", at, env, args, number)
        if "live" in answer:
            self._again(self._parsed.coarser(number))
        return self._decoded(answer)

    def truth(self, at: int, env: dict[str, Any], args: dict[str, Any], number: int) -> bool:
        """Return whether an expression is true."""
        return self._decoded(self._ask("truth", at, env, args, number)) is True

    def matches(self, snippet: int, env: dict[str, Any], name: str | None) -> bool:
        """Return whether what was raised is of a kind; binds it to a name if it is."""
        return self._decoded(self._ask("matches", snippet, env, name=name)) is True

    def context(self, snippet: int, env: dict[str, Any], target: str | None) -> "Context":
        """Return a context manager whose own is entered and left where the code is."""
        self._ask("enter", snippet, env, target=target)
        return Context(self)

    def leave(self, error: str | None) -> bool:
        """Leave the innermost context; returns whether it keeps an exception to itself."""
        return self._decoded(self._request({"do": "leave", "error": error})) is True

    def line_up(
        self, at: int, env: dict[str, Any], args: dict[str, Any], number: int, value: Any,
        operator: str, swapped: bool,
    ) -> Any:  # fmt: skip
        """Compare or combine what is no plain value with one that must not be known.

        Args:
            at: the expression that is no plain value.
            env: see `Split`.
            args: see `Split`.
            number: of the whole expression.
            value: the value on its other side.
            operator: name of the operator's node.
            swapped: whether the value is on the left.
        """
        if operator in ("In", "NotIn") and swapped:
            self._again(self._parsed.coarser(number))
        values, place = line_up(value, operator)
        try:
            candidates = [encode(candidate) for candidate in values]
        except NotPlainError:
            self._again(self._parsed.coarser(number))
        answer = self._ask(
            "line_up", at, env, args, number, operator=operator, swapped=swapped,
            candidates=candidates,
        )  # fmt: skip
        answers = answer.get("answers")
        if not isinstance(answers, list) or len(answers) != len(values):
            raise MalformedError
        right = answers.pop(place)
        if not isinstance(right, dict) or not all(isinstance(part, dict) for part in answers):
            raise MalformedError
        if "raised" in right:
            raise RaisedError
        if operator in ("Eq", "In", "NotEq", "NotIn"):
            equal = {"value": operator in ("Eq", "In")}
            if equal in answers or right not in ({"value": True}, {"value": False}):
                raise FailedError  # it would equal any value
            return right == {"value": True}
        if "live" in right:
            self._again(self._parsed.coarser(number))
        alike = [part for part in answers if "value" in part]
        if len(alike) >= _FEWEST_ALIKE and all(part == right for part in alike):
            raise FailedError  # what an operator makes of a value does not depend on it
        return self._decoded(right)

    # How it is asked.

    def end(self) -> bool:
        """End a run; returns False if the code's process had ended before.

        Raises:
            EOFError: the code's process is gone, or speaks after the end.
        """
        if self._ended:
            return False
        send(self._code, {"end": True})
        try:
            answer = receive(self._code, MAX_MESSAGE)
        except ValueError as error:
            raise EOFError from error
        if answer is None or "gone" not in answer:
            raise EOFError
        return True

    def _ask(
        self, what: str, at: int, env: dict[str, Any], args: dict[str, Any] | None = None,
        number: int = -1, **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        where = {"source": self._split.snippets[at]} if at >= 0 else {"closure": -at - 1}
        message = {"do": what, **where, "env": self._shared(env), **more}
        if args:
            message["args"] = self._handed_over(args, number)
        return self._request(message)

    def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer; asserts of functions are judged meanwhile."""
        if self._ended:
            raise FailedError
        send(self._code, message)
        while True:
            try:
                answer = receive(self._code, MAX_MESSAGE)
            except ValueError as error:
                raise MalformedError from error
            if answer is None:
                raise EOFError
            if "gone" in answer:
                self._ended = True
                raise FailedError
            if "raised" in answer:
                raise RaisedError
            if "check" not in answer:
                return answer
            send(self._code, self._check(answer["check"]))

    def _check(self, number: Any) -> dict[str, Any]:
        """Judge an assert that is where the code is."""
        found = self._split.asserts.get(number) if isinstance(number, int) else None
        if found is None:
            raise MalformedError
        if number not in self._conditions:
            self._conditions[number] = compile(found.test, "<test>", "eval")
        try:
            passed = bool(eval(self._conditions[number], self.space))
        except RaisedError:
            return {"go": False, "raise": True}
        except Exception:
            passed = False
        if passed:
            self.passed.add(number)
        elif not found.caught:
            raise FailedError
        return {"go": passed}

    def _shared(self, env: dict[str, Any]) -> dict[str, Any]:
        """Write down the test's variables; those that could be changed have to be there."""
        found = {}
        for name, value in env.items():
            if name not in self._parsed.once and not _immutable(value):
                self._parsed.marks.live.add(name)
                raise AgainError
            try:
                found[name] = encode(value)
            except NotPlainError:
                self._parsed.marks.live.add(name)
                raise AgainError from None
        return found

    def _handed_over(self, args: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            return {name: encode(value) for name, value in args.items()}
        except NotPlainError:
            self._again(self._parsed.coarser_scope(number))
            raise

    def _again(self, marked: bool) -> None:
        raise AgainError if marked else FailedError

    def _decoded(self, answer: dict[str, Any]) -> Any:
        try:
            return decode(answer["value"])
        except (ValueError, LookupError) as error:
            raise MalformedError from error


class Context:
    """A context of the code's process around statements of the judge."""

    def __init__(self, jail: Jail) -> None:
        self._jail = jail

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, ControlError):
            return False
        name = None if kind is None else "" if kind is RaisedError else kind.__name__
        return self._jail.leave(name)


def _immutable(value: Any) -> bool:
    if value is None or type(value) in (bool, int, float, str, bytes, complex, range):
        return True
    return type(value) in (tuple, frozenset) and all(map(_immutable, value))
