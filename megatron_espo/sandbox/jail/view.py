"""What a jail sees of the machine: a file system of its own, made of read-only views."""

import ctypes
import os
import re
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from .limits import die_with_parent

SCRATCH = "/scratch"
"""Where a completion may write, a folder in memory that ends with it."""
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin", "/etc/ld.so.cache")
"""What programs and libraries need of a machine."""
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_NOATIME, _MS_NODIRATIME, _MS_BIND, _MS_REC = 1024, 2048, 4096, 16384
_MS_PRIVATE, _MS_RELATIME = 1 << 18, 1 << 21
_KEPT = {"nosuid": _MS_NOSUID, "nodev": _MS_NODEV, "noexec": _MS_NOEXEC, "noatime": _MS_NOATIME,
         "nodiratime": _MS_NODIRATIME, "relatime": _MS_RELATIME}  # fmt: skip
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_DEVICES = ("null", "zero", "full", "random", "urandom")
_ROOT = "/tmp"  # any folder: what it holds is hidden from nobody else


def enter_namespaces(folders: Sequence[str]) -> None:
    """Go on in namespaces of this process's own, whose root holds views of some folders.

    The process that called waits for the one that goes on, and ends with its status.

    Args:
        folders: absolute paths, shown read-only where they are; those that do not exist are left
            out.

    Raises:
        OSError: the kernel refuses.
    """
    user, group = os.getuid(), os.getgid()
    kinds = os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    os.unshare(kinds if user == 0 else kinds | os.CLONE_NEWUSER)
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    child = os.fork()
    if child:
        _follow(child)
    die_with_parent()
    _make_root(folders)


def fresh_scratch(size: int) -> None:
    """Give this process a mount namespace with an empty scratch folder, and its children new ids.

    Args:
        size: bytes that all files in it may have together.

    Raises:
        OSError: this process may not.
    """
    os.unshare(os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWIPC)
    flags = _MS_NOSUID | _MS_NODEV
    _mount("tmpfs", SCRATCH, "tmpfs", flags, f"size={size},nr_inodes=4096,mode=0755")
    for name in ("tmp", "work", "shm"):
        os.mkdir(f"{SCRATCH}/{name}")
        os.chmod(f"{SCRATCH}/{name}", 0o1777)
    _mount(f"{SCRATCH}/shm", "/dev/shm", "", _MS_BIND)


def mount_processes() -> None:
    """Show this process's own namespace of processes, or none where the kernel refuses that."""
    try:
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    except OSError:
        _mount("none", "/proc", "tmpfs", _MS_RDONLY, "size=4k")


def _follow(child: int) -> None:
    """Wait for a child and end as it does."""
    os.closerange(3, 1024)
    die_with_parent()
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _make_root(folders: Sequence[str]) -> None:
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    # The folder may hold some of them: they are found by what they are, not by their paths.
    sources = [(path, os.open(path, os.O_PATH)) for path in sorted(folders) if os.path.exists(path)]
    devices = [(f"/dev/{name}", os.open(f"/dev/{name}", os.O_PATH)) for name in _DEVICES]
    _mount("none", _ROOT, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    for path, fd in (*sources, *devices):
        _show(path, fd)
    for folder in ("/dev/shm", "/proc", SCRATCH):
        os.makedirs(_ROOT + folder, exist_ok=True)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"{_ROOT}/dev/{name}")
    if not os.path.exists(f"{_ROOT}/tmp"):
        os.symlink(f"{SCRATCH}/tmp", f"{_ROOT}/tmp")
    _read_only(_ROOT)
    with suppress(OSError):  # of a container whose own hides something: there is none, then
        _mount("proc", f"{_ROOT}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    os.chdir(_ROOT)
    if libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b".") or libc.umount2(b".", _MNT_DETACH):
        raise OSError(ctypes.get_errno(), "the root cannot be changed")
    os.chdir("/")
    for _, fd in (*sources, *devices):
        os.close(fd)


def _show(path: str, fd: int) -> None:
    """Show a file or folder at its own path below the new root."""
    target = _ROOT + path
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    if os.path.lexists(target):
        return  # it lies within another
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.mkdir(target, 0o755)
    else:
        Path(target).touch()
    _mount(f"/proc/self/fd/{fd}", target, "", _MS_BIND | _MS_REC)


def _read_only(root: str) -> None:
    """Make everything mounted at or below a folder read-only; devices can be written to still."""
    for path, options in _mounts():
        if path == root or path.startswith(f"{root}/"):
            kept = sum(flag for name, flag in _KEPT.items() if name in options)
            kept |= _MS_NOSUID if not path.startswith(f"{root}/dev/") else 0
            _mount("none", path, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | kept)


def _mounts() -> Iterable[tuple[str, list[str]]]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        path = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
        yield path, fields[5].split(",")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    texts = [os.fsencode(text) or None for text in (source, target, kind)]
    if libc.mount(*texts, ctypes.c_ulong(flags), os.fsencode(data) or None):
        error = ctypes.get_errno()
        raise OSError(error, f"mount {target}: {os.strerror(error)}")
