"""RL tasks with verifiable rewards: one small file each, behind the interface of `tasks.base`."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import cast

from megatron_espo.errors import UserError
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
    found = _import(name, flag)
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


def _import(name: str, flag: str) -> object:
    path, colon, attribute = name.partition(":")
    unknown = UserError(
        f"{flag} {name}: no such task; use one of {', '.join(BUILT_IN)}, a FILE.py, or an "
        "importable my_package.my_task or my_package.my_tasks:attribute"
    )
    if path.endswith(".py"):
        module = _import_file(Path(path), flag)
        if colon and not hasattr(module, attribute):
            raise unknown
        return getattr(module, attribute) if colon else module
    if not all(part.isidentifier() for part in path.split(".")):
        raise unknown
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        # A module that exists but imports something missing is another mistake: keep its error.
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise unknown from error
    if not colon:
        return module
    if not hasattr(module, attribute):
        raise unknown
    return getattr(module, attribute)


def _import_file(path: Path, flag: str) -> ModuleType:
    """Import a file as Python runs one: what lies beside it can be imported, too."""
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; give the path of your task's FILE.py")
    path = path.resolve()
    # One name for one file, whatever its own is: it may be that of an installed module.
    name = f"espo_task_{hashlib.blake2b(bytes(path), digest_size=8).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # its name ends with .py
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
