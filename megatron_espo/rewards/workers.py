"""Scores completions in worker processes that are replaced when they hang or die."""

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, NamedTuple

from megatron_espo.errors import UserError
from megatron_espo.sandbox.jail.channel import receive, send
from megatron_espo.tasks.base import Example, Score, Task, start_line
from megatron_espo.tasks.blend import named_task
from megatron_espo.tasks.parts import Coalitions, Worth

_ATTEMPTS = 2  # of a completion whose worker dies: the first death may not be its fault
_START_SECONDS = 120.0  # importing a user's task may take long


class RewardError(RuntimeError):
    """A task's score raised an exception, or a worker cannot start."""


class Failures(NamedTuple):
    """What went wrong in workers.

    Attributes:
        timeouts: completions that got no reward because their score took too long.
        crashes: deaths of workers; a completion whose worker dies twice gets no reward.
    """

    timeouts: int
    crashes: int


@dataclass(frozen=True)
class _Job:
    example: Example
    completion: str
    coalitions: Coalitions | None
    future: "Future[Score]"


class _Worker:
    """One process and the socket to it."""

    def __init__(self, task_name: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # A fresh interpreter, not a fork: it has no threads, CUDA context or process group of
            # the trainer. In a session of its own, signals for the trainer's group pass it by: a
            # run that is told to stop still finishes its rollout's rewards.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_espo.rewards.worker",
                 str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,
            )  # fmt: skip
        self.connection = ours
        self.connection.settimeout(_START_SECONDS)
        send(ours, {"task": task_name})
        answer = receive(ours)
        if answer is None or "error" in answer:
            self.end()
            reason = answer["traceback"] if answer else f"exit code {self.process.returncode}"
            raise RewardError(f"a reward worker for --espo-task {task_name} cannot start: {reason}")

    def score(self, job: _Job, timeout: float) -> Score | None:
        """Score one completion; None if the worker died.

        Raises:
            TimeoutError: it took too long.
            RewardError: the task's score raised an exception.
            UserError: the task's score returned something that cannot be used.
        """
        answer = self._ask(job, timeout, None)
        return None if answer is None else Score(**answer)

    def parts(self, job: _Job, timeout: float) -> tuple[Worth, ...] | None:
        """Credit the parts of a completion; as :meth:`score`."""
        answer = self._ask(job, timeout, job.coalitions)
        return None if answer is None else tuple((a, b, v) for a, b, v in answer["parts"])

    def _ask(
        self, job: _Job, timeout: float, coalitions: Coalitions | None
    ) -> dict[str, Any] | None:
        self.connection.settimeout(timeout)
        prompt = job.example.prompt
        try:
            send(
                self.connection,
                {
                    "prompt": prompt if isinstance(prompt, str) else [dict(m) for m in prompt],
                    "answer": dict(job.example.answer),
                    "completion": job.completion,
                    "coalitions": coalitions,
                },
            )
            answer = receive(self.connection)
        except ConnectionError:
            return None
        if answer is not None and "mistake" in answer:
            raise UserError(answer["mistake"])
        if answer is not None and "error" in answer:
            raise RewardError(f"a task's score raised {answer['error']}\n{answer['traceback']}")
        return answer

    def end(self) -> None:
        """Kill the process, whatever it does, and wait for it."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


class RewardWorkers:
    """A task whose completions are scored by worker processes, several at once.

    It can stand wherever a `Task` can: `score` waits for the result of one `submit`. Processes
    start when there is work for them, and end with `close` or with this process, also when it is
    killed.

    Args:
        task: as loaded in this process; workers load it anew by ``name``.
        name: how `load_task` finds it, in the workers as here.
        num_workers: most processes.
        timeout: seconds of wall-clock time per completion; a slower one scores 0.
    """

    def __init__(self, task: Task, name: str, num_workers: int, timeout: float) -> None:
        self.task, self.name = task, task.name
        self._import_name, self._num_workers, self._timeout = name, num_workers, timeout
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._idle = self._timeouts = self._crashes = 0
        self._workers: dict[int, _Worker] = {}
        self._closed = False

    def read(self, path: str | PathLike[str]) -> list[Example]:
        """Read problems as the task does."""
        return self.task.read(path)

    def score(self, example: Example, completion: str) -> Score:
        """Score one completion and wait for it."""
        return self.submit(example, completion).result()

    def submit(
        self, example: Example, completion: str, coalitions: Coalitions | None = None
    ) -> "Future[Score]":
        """Hand over a completion.

        Args:
            example: its problem.
            completion: its text.
            coalitions: of its parts, to be scored, too, after the whole and with a time limit of
                their own; a completion whose parts take too long, or kill the worker twice, keeps
                its score and has no parts.

        Returns:
            Its score, once there is one. It may raise RewardError or UserError.
        """
        future: Future[Score] = Future()
        with self._lock:
            if self._closed:
                raise ValueError("these reward workers are closed")
            if self._jobs.qsize() >= self._idle and len(self._threads) < self._num_workers:
                # Not from a passing thread: the kernel ends a worker with the thread it came from.
                thread = threading.Thread(
                    target=self._serve, args=(len(self._threads),), name="reward", daemon=True
                )
                self._threads.append(thread)
                thread.start()
        self._jobs.put(_Job(example, completion, coalitions, future))
        return future

    def start_line(self) -> str | None:
        """Return what the task has to say when a run starts."""
        return start_line(self.task)

    def take_failures(self) -> Failures:
        """Return what went wrong since the last call."""
        with self._lock:
            failures = Failures(self._timeouts, self._crashes)
            self._timeouts = self._crashes = 0
        return failures

    def processes(self) -> list[int]:
        """Return the process ids of the running workers."""
        with self._lock:
            return [worker.process.pid for worker in self._workers.values()]

    def close(self) -> None:
        """End all workers; what is not scored yet is cancelled."""
        with self._lock:
            self._closed = True
            workers = list(self._workers.values())
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.future.cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for worker in workers:
            worker.process.kill()
        for thread in self._threads:
            thread.join(timeout=10)

    def _serve(self, number: int) -> None:
        """Take jobs to one worker process at a time, until told to stop."""
        while True:
            with self._lock:
                self._idle += 1
            job = self._jobs.get()
            with self._lock:
                self._idle -= 1
            if job is None:
                break
            if job.future.set_running_or_notify_cancel():
                try:
                    job.future.set_result(self._judge(number, job))
                except Exception as error:
                    job.future.set_exception(error)
        self._drop(number)

    def _judge(self, number: int, job: _Job) -> Score:
        score = self._attempt(number, job, _Worker.score)
        if score is None:
            task = named_task(self.task, job.example)
            return Score(reward=0.0, correct=False, metrics={}, task=task)
        if job.coalitions is None:
            return score
        return replace(score, parts=self._attempt(number, job, _Worker.parts) or ())

    def _attempt[T](
        self, number: int, job: _Job, ask: Callable[[_Worker, _Job, float], T | None]
    ) -> T | None:
        """Ask a worker, and once more where it dies; None where it takes too long or dies again."""
        for _ in range(_ATTEMPTS):
            try:
                found = ask(self._worker(number), job, self._timeout)
            except TimeoutError:
                self._drop(number)
                with self._lock:
                    self._timeouts += 1
                break
            if found is not None:
                return found
            self._drop(number)
            with self._lock:
                if self._closed:
                    break
                self._crashes += 1
        return None

    def _worker(self, number: int) -> _Worker:
        if number not in self._workers:
            worker = _Worker(self._import_name)
            with self._lock:
                self._workers[number] = worker
        return self._workers[number]

    def _drop(self, number: int) -> None:
        with self._lock:
            worker = self._workers.pop(number, None)
        if worker is not None:
            worker.end()


def collect(futures: Sequence["Future[Score]"]) -> list[Score]:
    """Wait for scores, in the order given; the first error cancels the rest."""
    try:
        return [future.result() for future in futures]
    except (RewardError, UserError):
        for future in futures:
            future.cancel()
        raise
