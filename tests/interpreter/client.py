"""The program that stands for Python: asks the server for a fork and stands in front of it."""

import fcntl
import json
import os
import resource
import signal
import socket
import sys
import time

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def _takes(arguments: list[str]) -> bool:
    """Whether a fork can do what is asked: run a module or a script."""
    words = iter(arguments)
    for word in words:
        if word == "-W":
            next(words, None)
        elif word != "-u":
            return word == "-m" or not word.startswith("-")
    return False


def _connect(python: str, server: str, folder: str, owner: int) -> socket.socket:
    """Connect to the server; the first to come starts it, and the others wait."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with open(f"{folder}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            connection.connect(f"{folder}/socket")
            return connection
        except FileNotFoundError:
            pass
        except ConnectionRefusedError:
            os.unlink(f"{folder}/socket")  # of a server that is no more
        process = os.fork()
        if process == 0:
            os.setsid()
            log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
                os.dup2(file, number)
            os.closerange(3, 256)
            root = os.path.dirname(server) + "/../.."
            # A process that has threads cannot be forked.
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
            os.chdir(root)
            os.execve(python, [python, server, f"{folder}/socket", str(owner)], environment)
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            time.sleep(0.02)
            try:
                connection.connect(f"{folder}/socket")
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                continue
    sys.exit(f"the server of forked interpreters did not start; see {folder}/log")


def main(python: str, server: str, folder: str, owner: int) -> None:
    """Run Python's arguments in a fork of the server, and end as it ends.

    Args:
        python: the real one, for what a fork cannot do.
        server: its file.
        folder: its socket's.
        owner: process that it ends with.
    """
    arguments = sys.argv[1:]
    if not _takes(arguments):
        os.execv(python, [python, *arguments])
    connection = _connect(python, server, folder, owner)
    for number in _FORWARDED:
        signal.signal(number, lambda got, _: connection.sendall(bytes([got])))
    request = {
        "arguments": arguments,
        "directory": os.getcwd(),
        "environment": dict(os.environ),
        # Of processor time, of a file's size, and others.
        "limits": [(kind, resource.getrlimit(kind)) for kind in range(10)],
    }
    body = json.dumps(request).encode()
    socket.send_fds(connection, [len(body).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(body)
    answer = connection.recv(4)
    status = os.waitstatus_to_exitcode(int.from_bytes(answer, "big")) if answer else 70
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)
