"""RL tasks with verifiable rewards: one small file each, behind the interface of `tasks.base`."""

import inspect
from functools import partial
from typing import cast

from megatron_espo.errors import UserError
from megatron_espo.own_code import load_own
from megatron_espo.tasks import code, countdown, gsm8k, math, sudoku
from megatron_espo.tasks.base import (
    SPLITS,
    ChatMessage,
    DemonstratingTask,
    Example,
    GeneratingTask,
    Score,
    Task,
    read_jsonl,
)
from megatron_espo.tasks.blend import Blend, load_blend

__all__ = [
    "BUILT_IN",
    "SPLITS",
    "Blend",
    "ChatMessage",
    "DemonstratingTask",
    "Example",
    "GeneratingTask",
    "Score",
    "Task",
    "load_task",
    "read_jsonl",
]

BUILT_IN: dict[str, Task] = {
    "sudoku": sudoku,
    "countdown": countdown,
    "gsm8k": gsm8k,
    "math": math,
    "code": code,
}


def load_task(name: str, *, flag: str = "--task") -> Task:
    """Return the task that `--task` names.

    Args:
        name: A built-in name; a file, "FILE.py"; or the import path of a module,
            "my_package.my_task". ":attribute" after either names an object in it. Several with
            their weights, "gsm8k:2,countdown:1", are a blend.
        flag: What the user set, for the errors.

    Returns:
        The module or object, checked to have the attributes of `Task`; or the blend.

    Raises:
        UserError: There is no such task, or what was found is not one.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if "," in name:
        return load_blend(name, partial(load_task, flag=flag), flag)
    unknown = UserError(
        f"{flag} {name}: no such task; use one of {', '.join(BUILT_IN)}, a FILE.py, or an "
        "importable my_package.my_task or my_package.my_tasks:attribute"
    )
    found = load_own(name, flag, "task", unknown)
    if inspect.isclass(found):
        raise UserError(f"{flag} {name}: is a class; name an instance of it or a module")
    missing = [part for part in ("read", "score") if not callable(getattr(found, part, None))]
    if not isinstance(getattr(found, "name", None), str):
        missing.insert(0, "name")
    if missing:
        # Many a mistyped name is that of some module that can be imported.
        kind = "module" if inspect.ismodule(found) else type(found).__name__
        raise UserError(
            f"{flag} {name}: no such task; use one of {', '.join(BUILT_IN)}, or a task of your own "
            f"(the {kind} of this name lacks {', '.join(missing)}: a task has name, a string, "
            "read(path) and score(example, completion))"
        )
    return cast(Task, found)
