"""Interleaved timings, peak memory of a fresh process, and the tables of both."""

import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

MIB = 2**20
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Environment in which glibc keeps freed memory for the next allocation."""


def keep_freed_memory() -> None:
    """Start this process again so that glibc's allocator keeps what is freed.

    By default glibc returns every large block to the system and asks for it anew, zeroed page by
    page. A step with whole-sequence logits then waits for the kernel longer than it computes (on a
    virtual machine by a factor), which would flatter the side that allocates less.
    """
    if any(name not in os.environ for name in KEEP_MEMORY):
        os.environ.update(KEEP_MEMORY)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Write the median with the range behind it."""
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Take the median and the range.

    Args:
        values: at least one.

    Returns:
        The spread.
    """
    return Spread(statistics.median(values), min(values), max(values))


def interleaved(
    sides: dict[str, Callable[[], Any]], pairs: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Time several sides one after the other, round by round, each round in another order.

    A machine's speed drifts; what runs within one round drifts together, so that the ratios of a
    round are steadier than its times.

    Args:
        sides: what to run, by name.
        pairs: rounds; one more round before them warms up and is not counted.

    Returns:
        Seconds of each side by round, and what each side returned in the first round.
    """
    results = {name: run() for name, run in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(pairs):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in order:
            gc.collect()
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


def ratios(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """Divide the times of each round: how many times as fast ``fast`` is.

    Args:
        slow: seconds by round.
        fast: seconds by round.

    Returns:
        Median and range of the ratios.
    """
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def peak_memory(prepare: Callable[..., Callable[[bool], Any]], *arguments: Any) -> int:
    """Measure how much memory a piece of work takes above what is there before it.

    Runs in a fresh process with the default allocator, so that no memory which another side freed
    is used again unseen. The process builds the weights and runs the work once at a small size (for
    what libraries load when they are first used), hands free memory back to the system, resets the
    kernel's record of its largest resident size, and runs the work. Linux only.

    Args:
        prepare: a function at the top level of a module: called with ``arguments``, it builds
            everything and returns the work, which takes whether to run at the small size.
        *arguments: arguments that can be pickled.

    Returns:
        Bytes: largest resident size during the work less the resident size before it.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_measure, args=(sender, torch.get_num_threads(), prepare, arguments)
    )
    kept = {name: os.environ.pop(name, None) for name in KEEP_MEMORY}
    process.start()
    os.environ.update({name: value for name, value in kept.items() if value is not None})
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError:
        raise RuntimeError("the process whose memory was to be measured ended early") from None
    finally:
        process.join()


def _measure(sender: Any, threads: int, prepare: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(threads)
    work = prepare(*arguments)
    work(True)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts again from here
    before = _status("VmRSS")
    work(False)
    sender.send(_status("VmHWM") - before)


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, Any]:
    """Describe the machine and the libraries behind a measurement."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
        model = names[0] if names else model
    import megatron.core
    import transformers

    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "freed memory": "kept" if "MALLOC_MMAP_MAX_" in os.environ else "returned",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "megatron-core": megatron.core.__version__,
    }


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table.

    Args:
        header: names of the columns.
        rows: cells.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")


def as_json(value: Any) -> Any:
    """Turn spreads into plain dictionaries, for json.dumps(default=...)."""
    return asdict(value)
