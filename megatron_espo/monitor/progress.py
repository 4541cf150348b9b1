"""The console's view of a run: one line per rollout, with the time left."""

import time


def format_duration(seconds: float) -> str:
    """Write a duration the way people read it: 45s, 3m20s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


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
