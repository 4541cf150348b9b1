"""Several tasks in one run: problems that know their task, and a score that asks it.

``--espo-task gsm8k:2,countdown:1`` names tasks with their weights, ``--espo-train-data
gsm8k=FILE,countdown=FILE`` their problems.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from os import PathLike, fspath

from megatron_espo.errors import UserError
from megatron_espo.tasks.base import Example, Score, Task, read_examples, start_line
from megatron_espo.tasks.checking import checked_score
from megatron_espo.tasks.parts import PartedTask, Span, scores_parts


@dataclass(frozen=True)
class Part:
    """One task of several.

    Attributes:
        spelling: what the command line calls it.
        weight: how many prompts are of it, relative to the others.
        task: reads and scores its own problems.
    """

    spelling: str
    weight: float
    task: Task


class Blend:
    """Several tasks as one (`Task`'s interface)."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Put tasks together.

        Args:
            parts: the tasks, at least two, with different names.
        """
        self.parts = {part.task.name: part for part in parts}
        self.name = "+".join(self.parts)

    def spellings(self) -> list[str]:
        """Return what the command line calls the tasks."""
        return [part.spelling for part in self.parts.values()]

    def files(
        self, given: str | PathLike[str], flag: str, every_task: bool = False
    ) -> dict[str, str]:
        """Say which file each task's problems are in.

        Args:
            given: "TASK=FILE,TASK=FILE", tasks by their names or as the command line calls them.
            flag: that has this value, for the errors.
            every_task: whether each of them must have a file.

        Returns:
            Files by the tasks' names, in the order of the tasks; those without a file are left out.

        Raises:
            UserError: this is no such list, or names another task or one twice, or leaves one out.
        """
        text = fspath(given)
        known = {part.spelling: name for name, part in self.parts.items()}
        known |= {name: name for name in self.parts}
        found: dict[str, str] = {}
        for item in text.split(","):
            task, equals, path = item.strip().partition("=")
            if not equals or not path or task not in known:
                raise UserError(
                    f"{flag} {text}: with several tasks, give each its file: "
                    f"{','.join(f'{name}=FILE' for name in self.parts)}"
                )
            if known[task] in found:
                raise UserError(f"{flag} {text}: names {task} twice; put its problems in one file")
            found[known[task]] = path
        missing = [name for name in self.parts if name not in found]
        if every_task and missing:
            raise UserError(f"{flag} {text}: names no file for {missing[0]}; add {missing[0]}=FILE")
        return {name: found[name] for name in self.parts if name in found}

    def read(self, path: str | PathLike[str]) -> list[Example]:
        """Read the problems of all tasks, one task after another.

        Args:
            path: see `files`.

        Returns:
            Problems that know their task.

        Raises:
            UserError: as the tasks raise it.
        """
        files = self.files(path, "data")
        return [
            of_task(name, example)
            for name, file in files.items()
            for example in read_examples(self.parts[name].task, file)
        ]

    def score(self, example: Example, completion: str) -> Score:
        """Ask the problem's task.

        Args:
            example: from `read`.
            completion: its text.

        Returns:
            The task's score, which names it.

        Raises:
            UserError: the task returned something that cannot be used.
        """
        task = self.parts[example.answer["task"]].task
        inner = self._inner(example)
        score = checked_score(task.name, inner, task.score(inner, completion))
        return replace(score, task=task.name)

    def segments(self, example: Example, completion: str) -> Sequence[Span]:
        """Ask the problem's task for the parts of a completion, see `tasks.parts`."""
        return self._parted(example).segments(self._inner(example), completion)

    def score_segments(
        self, example: Example, completion: str, kept: Sequence[Sequence[int]]
    ) -> Sequence[float]:
        """Ask the problem's task what some parts of a completion would earn."""
        return self._parted(example).score_segments(self._inner(example), completion, kept)

    def _parted(self, example: Example) -> PartedTask:
        task = self.parts[example.answer["task"]].task
        assert isinstance(task, PartedTask), "checked when the run starts"
        return task

    @staticmethod
    def _inner(example: Example) -> Example:
        return Example(example.prompt, example.answer["answer"])

    def start_line(self) -> str | None:
        """Return what the tasks have to say when a run starts."""
        lines = [line for part in self.parts.values() if (line := start_line(part.task))]
        return "\n".join(lines) or None


def without_parts(task: Task) -> list[str]:
    """Name the tasks, of one or several, that cannot score parts of a completion."""
    tasks = [part.task for part in task.parts.values()] if isinstance(task, Blend) else [task]
    return [part.name for part in tasks if not scores_parts(part)]


def of_task(name: str, example: Example) -> Example:
    """Let a problem know its task: plain values, as they travel to reward workers."""
    return Example(example.prompt, {"task": name, "answer": dict(example.answer)})


def named_task(task: Task, example: Example) -> str | None:
    """Return the name of a problem's task where that is one of several."""
    return str(example.answer["task"]) if isinstance(task, Blend) else None


def load_blend(text: str, load: Callable[[str], Task], flag: str) -> Blend:
    """Load several tasks.

    Args:
        text: "TASK:WEIGHT,TASK:WEIGHT"; a weight that is missing is 1.
        load: loads one of them.
        flag: that has this value, for the errors.

    Returns:
        The blend.

    Raises:
        UserError: a weight is no positive number, there is one task only or one twice, or as
            `load` raises it.
    """
    parts = []
    for item in text.split(","):
        name, colon, number = item.strip().rpartition(":")
        weight = _number(number) if colon else None
        if weight is None:
            name, weight = item.strip(), 1.0
        if not name or not 0.0 < weight < inf:
            raise UserError(
                f"{flag} {text}: give tasks with positive weights, for example gsm8k:2,countdown:1"
            )
        parts.append(Part(name, weight, load(name)))
    names = [part.task.name for part in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{flag} {text}: two tasks are called {twice}; leave one of them out")
    return Blend(parts)


def _number(text: str) -> float | None:
    """Read a weight; None where a name follows the colon (FILE.py:attribute)."""
    try:
        return float(text)
    except ValueError:
        return None
