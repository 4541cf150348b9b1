"""Completions per second of the code reward: small functions with three assertions each.

``PYTHONPATH=CHECKOUT python benchmarks/code_reward.py`` measures another checkout with the same
Python, so that two of them can take turns.
"""

import argparse
import time
from collections.abc import Sequence

from megatron_espo.rewards.workers import RewardWorkers
from megatron_espo.tasks import code
from megatron_espo.tasks.base import Example


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print.

    Args:
        argv: Command line without the program's name; by default the process's own.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--completions", type=int, default=100, help="how many")
    parser.add_argument("--workers", type=int, default=2, help="reward workers")
    args = parser.parse_args(argv)
    jobs = [_job(number) for number in range(args.completions)]
    workers = RewardWorkers(code, "code", args.workers, 60.0)
    try:
        for future in [workers.submit(*job) for job in jobs[: 2 * args.workers]]:
            future.result()  # until all of them are warm
        start = time.perf_counter()
        scores = [future.result() for future in [workers.submit(*job) for job in jobs]]
        seconds = time.perf_counter() - start
    finally:
        workers.close()
    right = sum(score.correct for score in scores)
    print(f"{len(jobs) / seconds:.1f} completions a second, {right} of {len(jobs)} right")


def _job(number: int) -> tuple[Example, str]:
    """Return a problem and its solution."""
    tests = [
        f"assert f({number}) == [{number}, {number + 1}]",
        "assert sorted(f(-5)) == [-5, -4]",
        f"assert len(f(0)) == 2 and f(1)[0] < {number + 2}",
    ]
    program = f"def f(x):\n    # {number}\n    return [x, x + 1]"
    return Example("", {"tests": tests, "given": ""}), f"```python\n{program}\n```"


if __name__ == "__main__":
    main()
