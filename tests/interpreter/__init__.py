"""Interpreters that have imported already: a program ``python`` that forks one which waits.

Importing PyTorch and Megatron takes seconds of each process that a test starts, and ranks are
processes. :func:`prepare` writes a program that takes Python's arguments and stands for it
(``client.py``). Its first call starts a server that imports once (``server.py``); the server forks,
and the fork runs the module or the script in the directory and with the environment, the files and
the signals of the program's own process. What is about start-up itself is tested with Python.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

# Names of the program, for this package and for torchrun.
_VARIABLES = ("FORKED_PYTHON", "PYTHON_EXEC")


def prepare() -> Path:
    """Write the program and name it in the environment; its server ends with this process.

    Returns:
        Its folder.
    """
    folder = Path(tempfile.mkdtemp(prefix="interpreter-"))
    program = folder / "python"
    here = Path(__file__).parent
    program.write_text(
        f"#!{sys.executable} -IS\n{(here / 'client.py').read_text()}\n"
        f"main({sys.executable!r}, {str(here / 'server.py')!r}, {str(folder)!r}, {os.getpid()})\n"
    )
    program.chmod(0o755)
    os.environ.update(dict.fromkeys(_VARIABLES, str(program)))
    return folder


def clean_up(folder: Path) -> None:
    """Undo :func:`prepare`."""
    for name in _VARIABLES:
        os.environ.pop(name, None)
    shutil.rmtree(folder, ignore_errors=True)


def python() -> str:
    """The program to start Python processes with: a forked one, or Python itself."""
    return os.environ.get(_VARIABLES[0], sys.executable)
