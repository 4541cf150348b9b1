"""The console's view of a run: one line per rollout, with the time left."""

import time

from megatron_espo.console import say


def format_duration(seconds: float) -> str:
    """Write a duration the way people read it: 45s, 3m20s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Heartbeat:
    """Says now and then that long work goes on; work that is done soon says nothing."""

    def __init__(self, what: str, interval: float = 60.0) -> None:
        """Start the clock.

        Args:
            what: is going on.
            interval: seconds from one line to the next.
        """
        self._what, self._interval = what, interval
        self._started = self._said = time.monotonic()

    def beat(self) -> None:
        """Look at the clock."""
        now = time.monotonic()
        if now - self._said >= self._interval:
            self._said = now
            say(f"{self._what}: for {format_duration(now - self._started)} so far")


class Progress:
    """Estimates the time left from the steps done in this process."""

    def __init__(self, first: int, total: int) -> None:
        """Start the clock.

        Args:
            first: steps that were done before (a resumed run).
            total: steps of the whole run.
        """
        self._first, self._total = first, total
        self._started = time.monotonic()

    def time_left(self, done: int) -> str:
        """Say how long the remaining steps will take at the pace so far.

        Args:
            done: steps done, those before this process included.

        Returns:
            A duration for people.
        """
        pace = (time.monotonic() - self._started) / max(done - self._first, 1)
        return format_duration(pace * (self._total - done))
