"""Locks a process in: limits, another user, no rights, no network, no way to gain any."""

import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

MIB = 1 << 20
SHARED = 3072 * MIB
"""Address space beyond a process's own memory: what libraries map, torch's for example."""
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_PR_SET_SECCOMP, _SECCOMP_FILTER = 22, 2
_CAPABILITY_VERSION = 0x20080522
# Architecture's audit number, and the system calls refused: socket, setsid, setpgid, ptrace,
# process_vm_readv/writev, unshare, setns, mount, umount2, pivot_root, bpf, perf_event_open,
# userfaultfd, keyctl, memfd_create.
_REFUSED = {
    "x86_64": (0xC000003E, (41, 112, 109, 101, 310, 311, 272, 308, 165, 166, 155, 321, 298, 323,
                            250, 319)),
    "aarch64": (0xC00000B7, (198, 157, 154, 117, 270, 271, 97, 268, 40, 39, 41, 280, 241, 282,
                             219, 279)),
}  # fmt: skip
# io_uring, open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, pidfd_getfd, mount_setattr;
# clone3, whose flags a filter cannot see (glibc then uses clone).
_REFUSED_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 435)
# Calls that are allowed with some arguments only. A datagram socket of a pair can still send to any
# path, the system's log for example, so that only pairs of streams are made. A process may be
# cloned, but not into namespaces, where it would have rights.
_SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
_CLONE = {"x86_64": 56, "aarch64": 220}
_NAMESPACES = 0x7E020000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _LEAVE, _MASK = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
_REFUSE, _KILL, _ALLOW = 0x00050000, 0x80000000, 0x7FFF0000


def lock_in(settings: Mapping[str, int]) -> None:
    """Apply limits to this process and all its children, for good.

    Args:
        settings: "memory" (bytes of its own), "cpu" (seconds), "processes", "file" (bytes), "user"
            (id to become, 0 to stay), "running" (threads that its user has anyway), "open" (whether
            others of its user may look into it).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user = settings["user"]
    processes = settings["processes"]
    if not user:
        processes += settings["running"]
    for kind, most in (
        (resource.RLIMIT_DATA, settings["memory"]),
        (resource.RLIMIT_AS, settings["memory"] + SHARED),
        (resource.RLIMIT_CPU, settings["cpu"]),
        (resource.RLIMIT_FSIZE, settings["file"]),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    for capability in range(64):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _drop_capabilities(libc)
    # No process of the same user can then write to this one's memory through /proc.
    libc.prctl(_PR_SET_DUMPABLE, settings["open"], 0, 0, 0)
    # After the change of user, which clears it.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if platform.machine() in _REFUSED:
        _refuse_system_calls(libc)


def threads_of(user: int) -> int:
    """Count a user's threads, which its limit of processes counts.

    Args:
        user: its id.
    """
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid == user:
                count += len(os.listdir(folder / "task"))
        except OSError:  # it has ended
            continue
    return count


def close_to_others() -> None:
    """Close this process's memory and files to other processes of its user."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Give up what a user namespace gives."""
    head = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    libc.capset(head, bytes(24))


def _refuse_system_calls(libc: ctypes.CDLL) -> None:
    """Make some system calls fail with EPERM (ENOSYS for clone3, so that glibc does without)."""
    audit, refused = _REFUSED[platform.machine()]
    refuse = _REFUSE | errno.EPERM
    program = [
        _instruction(_LOAD, 0, 0, 4),  # architecture
        _instruction(_EQUAL, 1, 0, audit),
        _instruction(_LEAVE, 0, 0, _KILL),
        _instruction(_LOAD, 0, 0, 0),  # number
        _instruction(_AT_LEAST, 0, 1, 0x40000000),  # x32's second set of numbers
        _instruction(_LEAVE, 0, 0, _KILL),
        _instruction(_EQUAL, 0, 5, _SOCKETPAIR[platform.machine()]),
        _instruction(_LOAD, 0, 0, 24),  # its second argument, of which four bits are the type
        _instruction(_MASK, 0, 0, 0xF),
        _instruction(_EQUAL, 1, 0, socket.SOCK_STREAM),
        _instruction(_LEAVE, 0, 0, refuse),
        _instruction(_LOAD, 0, 0, 0),
        _instruction(_EQUAL, 0, 4, _CLONE[platform.machine()]),
        _instruction(_LOAD, 0, 0, 16),  # its first argument
        _instruction(_ANY_BIT, 0, 1, _NAMESPACES),
        _instruction(_LEAVE, 0, 0, refuse),
        _instruction(_LOAD, 0, 0, 0),
    ]
    for number in (*refused, *_REFUSED_EVERYWHERE):
        error = _REFUSE | errno.ENOSYS if number == 435 else refuse
        program += [_instruction(_EQUAL, 0, 1, number), _instruction(_LEAVE, 0, 0, error)]
    program.append(_instruction(_LEAVE, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(program))
    head = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    )
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(head), 0, 0)


def _instruction(code: int, true: int, false: int, value: int) -> bytes:
    return struct.pack("HBBI", code, true, false, value)
