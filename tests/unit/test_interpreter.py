"""The server of forked interpreters outlives what tests do to those who ask it."""

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interpreter import python

pytestmark = pytest.mark.skipif(python() == sys.executable, reason="no forked interpreters")


def answer(script: Path) -> list[int]:
    """What a fork prints of itself and its parent."""
    done = subprocess.run([python(), str(script)], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def connect() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(Path(python()).with_name("socket")))
    return connection


def test_a_fork_and_its_client_that_end_at_once_end_no_server(tmp_path: Path) -> None:
    script, sleeper = tmp_path / "script.py", tmp_path / "sleeper.py"
    script.write_text("import os; print(os.getpid(), os.getppid())")
    sleeper.write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    _, server = answer(script)
    client = subprocess.Popen([python(), str(sleeper)], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    fork = int(client.stdout.readline())
    # Both ends are there when it looks again.
    os.kill(server, signal.SIGSTOP)
    try:
        os.kill(fork, signal.SIGKILL)
        while Path(f"/proc/{fork}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        client.kill()
        client.wait()
    finally:
        os.kill(server, signal.SIGCONT)
    assert answer(script)[1] == server


@pytest.mark.parametrize("sent", [b"", b"\0", struct.pack(">I", 9), struct.pack(">I", 9) + b"{}"])
def test_a_client_that_is_killed_while_it_asks_ends_no_server(tmp_path: Path, sent: bytes) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.getpid(), os.getppid())")
    _, server = answer(script)
    with connect() as connection:
        connection.sendall(sent)
    assert answer(script)[1] == server
