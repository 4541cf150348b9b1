"""Locks a process in: limits, another user, no network, no way to gain rights."""

import ctypes
import errno
import importlib
import os
import platform
import resource
import signal
import socket
import struct
from collections.abc import Mapping

MIB = 1 << 20
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_PR_SET_SECCOMP, _SECCOMP_FILTER = 22, 2
# Architecture's audit number, and the system calls refused: socket, setsid, setpgid, ptrace,
# process_vm_readv/writev, unshare, setns, mount, bpf, perf_event_open, userfaultfd, keyctl.
_REFUSED = {
    "x86_64": (0xC000003E, (41, 112, 109, 101, 310, 311, 272, 308, 165, 321, 298, 323, 250)),
    "aarch64": (0xC00000B7, (198, 157, 154, 117, 270, 271, 97, 268, 40, 280, 241, 282, 219)),
}
_REFUSED_EVERYWHERE = (425, 426, 427, 428, 435)  # io_uring, open_tree, clone3 (glibc uses clone)
# A datagram socket of a pair can still send to any path, the system's log for example, so that only
# pairs of streams are made.
_SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
# What generated code imports; loaded before the change of user, after which the standard library
# of an interpreter in a private folder can no longer be read.
_PRELOADED = (
    "array ast base64 bisect builtins calendar cmath collections copy csv dataclasses datetime "
    "decimal difflib enum fractions functools hashlib heapq io itertools json keyword math "
    "numbers operator pprint queue random re secrets statistics string struct sys textwrap "
    "threading time traceback types typing unicodedata uuid"
).split()


def lock_in(settings: Mapping[str, int]) -> None:
    """Apply limits to this process and all its children, for good.

    Args:
        settings: "memory" (bytes of address space), "cpu" (seconds), "processes", "file" (bytes),
            "user" (id to become, 0 to stay), "preload" (whether to import modules beforehand).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if settings["preload"]:
        for name in _PRELOADED:
            importlib.import_module(name)
    for kind, most in (
        (resource.RLIMIT_AS, settings["memory"]),
        (resource.RLIMIT_CPU, settings["cpu"]),
        (resource.RLIMIT_FSIZE, settings["file"]),
        (resource.RLIMIT_NPROC, settings["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    user = settings["user"]
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    # No process of the same user can then write to this one's memory through /proc: where jails
    # share a user, generated code could change the verdict in the tests' jail.
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    # After the change of user, which clears it.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if platform.machine() in _REFUSED:
        _refuse_system_calls(libc)


def _refuse_system_calls(libc: ctypes.CDLL) -> None:
    """Make some system calls fail with EPERM (ENOSYS for clone3, so that glibc does without)."""
    audit, refused = _REFUSED[platform.machine()]
    numbers = (*refused, *_REFUSED_EVERYWHERE)

    def instruction(code: int, true: int, false: int, value: int) -> bytes:
        return struct.pack("HBBI", code, true, false, value)

    load, equal, at_least, leave, mask = 0x20, 0x15, 0x35, 0x06, 0x54
    refuse, kill, allow = 0x00050000, 0x80000000, 0x7FFF0000
    program = [
        instruction(load, 0, 0, 4),  # architecture
        instruction(equal, 1, 0, audit),
        instruction(leave, 0, 0, kill),
        instruction(load, 0, 0, 0),  # number
        instruction(at_least, 0, 1, 0x40000000),  # x32's second set of numbers
        instruction(leave, 0, 0, kill),
        instruction(equal, 0, 5, _SOCKETPAIR[platform.machine()]),
        instruction(load, 0, 0, 24),  # its second argument, of which four bits are the type
        instruction(mask, 0, 0, 0xF),
        instruction(equal, 1, 0, socket.SOCK_STREAM),
        instruction(leave, 0, 0, refuse | errno.EPERM),
        instruction(load, 0, 0, 0),
    ]
    for number in numbers:
        error = errno.ENOSYS if number == 435 else errno.EPERM
        program += [instruction(equal, 0, 1, number), instruction(leave, 0, 0, refuse | error)]
    program.append(instruction(leave, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(program))
    head = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    )
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(head), 0, 0)
