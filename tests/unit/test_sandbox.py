# ruff: noqa: E501  (programs on one line)
"""The sandbox: honest code passes, dishonest code does not, hostile code harms nothing."""

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_espo.config import EspoConfig
from megatron_espo.errors import UserError
from megatron_espo.evaluation.problems import load_workers
from megatron_espo.sandbox import run as sandbox
from megatron_espo.sandbox import warm
from megatron_espo.sandbox.jail.limits import SHARED
from megatron_espo.sandbox.run import run_tests
from megatron_espo.sandbox.warm import Limits, Mode
from tests.unit.programs import MODE_MARKS, WORKING

pytestmark = pytest.mark.slow

LIMITS = Limits(test_seconds=2.0, total_seconds=5.0, memory=512 << 20)
TEST = "assert f(2) == 5"


LIMITS = Limits(test_seconds=2.0, total_seconds=5.0, memory=512 << 20)
GENEROUS = Limits(test_seconds=10.0, total_seconds=60.0)
TEST = "assert f(2) == 5"
CONTAINING = [mode for mode in WORKING if mode != "limits"]


@pytest.fixture
def fresh() -> Iterator[None]:
    """No warm jail, and no mode found out, before and after."""
    warm.close_jails()
    sandbox.sandbox_mode.cache_clear()
    yield
    warm.close_jails()
    sandbox.sandbox_mode.cache_clear()


def test_the_best_mode_that_works_is_taken_and_says_what_it_leaves_open(fresh: None) -> None:
    assert sandbox.sandbox_mode() == WORKING[0]
    line = sandbox.start_line()
    assert line.startswith(f"sandbox: {WORKING[0]}")
    assert ("are hidden" in line) == (WORKING[0] != "limits")


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """As on a machine where some modes cannot be had."""
    real = warm.Jail.__init__

    def start(self: warm.Jail, mode: warm.Mode) -> None:
        if mode in missing:
            raise OSError(f"no {mode} here")
        real(self, mode)

    monkeypatch.setattr(warm.Jail, "__init__", start)


@pytest.mark.skipif("namespaces" not in WORKING, reason="needs namespaces")
def test_without_bubblewrap_the_next_mode_is_taken(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "bubblewrap")
    assert sandbox.sandbox_mode() == "namespaces"


def test_limits_alone_have_to_be_accepted(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "bubblewrap", "namespaces")
    monkeypatch.delenv(sandbox.ACCEPT, raising=False)
    with pytest.raises(UserError, match=r"cannot be contained.*no bubblewrap here.*--espo-accept"):
        sandbox.sandbox_mode()
    monkeypatch.setenv(sandbox.ACCEPT, "1")
    assert sandbox.sandbox_mode() == "limits"
    assert "change and delete" in sandbox.start_line()


def test_a_run_asks_for_it_before_it_starts(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "bubblewrap", "namespaces")
    monkeypatch.setenv(sandbox.ACCEPT, "0")
    with pytest.raises(UserError, match="--espo-accept-uncontained-code"):
        load_workers(EspoConfig(task="code"))
    load_workers(EspoConfig(task="countdown"))  # which runs no code
    assert load_workers(EspoConfig(task="code", accept_uncontained_code=True)).name == "code"
    assert os.environ[sandbox.ACCEPT] == "1"  # for the workers


def test_a_jail_that_ends_is_replaced() -> None:
    mode = WORKING[0]
    assert run_tests(["def f(x): return 5"], [TEST], LIMITS, mode) == [True]
    warm.warm_jail(mode)._process.kill()
    warm.warm_jail(mode)._process.wait()
    large = "x = 1\n" * 50_000  # more than a socket holds
    verdicts = [run_tests([large + "def f(x): return 5"], [TEST], LIMITS, mode) for _ in range(2)]
    assert verdicts[-1] == [True]


HONEST = {
    "function": ("def f(x): return x + 3", [TEST, "assert f(0) == 3", "assert f(0) == 4"], "110"),
    "helper": ("import math\ndef g(x): return 3\ndef f(x): return x + g(x)", [TEST], "1"),
    "containers": (
        "def f(x): return {'a': [1, (2.5, None)], 3: {4}, 'z': frozenset([b'b'])}",
        ["assert f(0) == {'a': [1, (2.5, None)], 3: {4}, 'z': frozenset([b'b'])}",
         "assert f(0)['a'][1] == [2.5, None]"], "10",
    ),
    "generator": ("def f(n): yield from range(n)", ["assert list(f(3)) == [0, 1, 2]"], "1"),
    "big number": ("def f(n): return 7 ** n", ["assert f(9999) == 7 ** 9999"], "1"),
    "in place": ("def f(v): v.sort()", ["a = [2, 1]\nf(a)\nassert a == [1, 2]"], "1"),
    "exception": (
        "class E(KeyError): pass\ndef f(x): raise E('no')",
        ["try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    assert False",
         "try:\n    f(1)\nexcept TypeError:\n    pass"], "10",
    ),
    "assertion of the code": (
        "def f(x): assert x > 0",
        ["try:\n    f(-1)\nexcept AssertionError:\n    pass\nelse:\n    raise ValueError", "f(-1)"],
        "10",
    ),
    "class": (
        "class Stack:\n    def __init__(self, *v): self.v = list(v)\n"
        "    def push(self, x): self.v.append(x)\n    def __len__(self): return len(self.v)",
        ["s = Stack(1)\ns.push(2)\nassert s.v == [1, 2] and len(s) == 2", "assert Stack() == []"],
        "10",
    ),
    "passed function": ("def f(g, v): return [g(x) for x in v]",
                        ["assert f(lambda x: x * 2, [1, 2]) == [2, 4]",
                         "assert f(str, [1]) == ['1']"], "11"),
    "passed function that calls the code": (
        "def g(x): return x + 1\ndef f(h, v): return [h(x) for x in v]",
        ["assert f(lambda x: g(x) * 2, [1, 2]) == [4, 6]",
         "assert f(lambda x: f(lambda y: g(x + y), [1]), [2]) == [[4]]"], "11",
    ),
    "passed method": (
        "class C:\n    def g(self, x): return x + 1\ndef g(x): return 0\ndef f(h, x): return h(x)",
        ["assert f(C().g, 2) == 3", "assert f(g, 2) == 0"], "11",
    ),
    "passed function that raises": (
        "def f(g): return g()",
        ["def h(): raise KeyError\ntry:\n    f(h)\nexcept KeyError:\n    pass\nelse:\n"
         "    raise ValueError", "assert f(lambda: 3) == 3"], "11",
    ),
    "built-in's name": ("def sum(a, b): return a * b", ["assert sum(2, 3) == 6"], "1"),
    "constant": ("LIMIT = 3\ndef f(x): return x", ["assert f(1) < LIMIT"], "1"),
    "no shared state": ("n = []\ndef f(): n.append(1); return len(n)", ["assert f() == 1"] * 2, "11"),
    "numpy names": ("import math\ndef f(x): return math.pi", ["assert math.isclose(f(1), math.pi)"],
                    "1"),
    "imports": ("import heapq, decimal\ndef f(x):\n    import random, difflib, statistics\n    return 5", [TEST], "1"),
    "test imports": ("def f(x): return 5", ["import random, statistics\nassert f(2) == statistics.mean([5])"], "1"),
    "prints": ("def f(x):\n    print('x' * 10)\n    return 5", [TEST], "1"),
    "one test crashes": ("import os\ndef f(x):\n    return os._exit(0) if x == 1 else x",
                         ["assert f(0) == 0", "assert f(1) == 1", "assert f(2) == 2"], "101"),
    "one test hangs": ("def f(x):\n    while x == 1: pass\n    return x",
                       ["assert f(0) == 0", "assert f(1) == 1", "assert f(2) == 2"], "101"),
}  # fmt: skip


@pytest.mark.parametrize("case", HONEST)
def test_each_test_gets_its_own_verdict(case: str) -> None:
    code, tests, verdicts = HONEST[case]
    assert run_tests([code], tests, Limits(test_seconds=3.0)) == [v == "1" for v in verdicts]


@pytest.mark.parametrize("mode", WORKING)
def test_every_mode_gives_the_same_verdicts(mode: Mode) -> None:
    for case in ("function", "class", "imports", "test imports", "one test crashes"):
        code, tests, verdicts = HONEST[case]
        assert run_tests([code], tests, Limits(test_seconds=3.0), mode) == [
            v == "1" for v in verdicts
        ]


# What must not get out of the jail: each body runs in f and passes only if the jail holds.
CONTAINED = {
    "no inet socket": "import socket\n    try: socket.socket()\n    except OSError: return 5",
    "no unix socket": "import socket\n    try: socket.socket(socket.AF_UNIX)\n    except OSError: return 5",
    "no datagram to a path": (
        "import socket\n    try: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "    except OSError: return 5"
    ),
    "no sequenced packets": (
        "import socket\n    try: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "    except OSError: return 5"
    ),
    "stream pairs work": (  # asyncio wakes itself with one
        "import socket\n    a, b = socket.socketpair()\n    a.send(bytes([5]))\n"
        "    return b.recv(1)[0]"
    ),
    # As bytes: a name as text would need a codec that a private interpreter keeps to itself.
    "no look-up of a name": (
        "import socket\n    try: socket.gethostbyname(b'example.com')\n    except OSError: return 5"
    ),
    "no address of a name": (
        "import socket\n    try: socket.getaddrinfo(b'example.com', 80)\n    except OSError: return 5"
    ),
    "not root": "import os\n    return 5 if all(map(min, (os.getresuid(), os.getresgid()))) and not os.getgroups() else 0",
    "cannot become root": "import os\n    try: os.setuid(0)\n    except OSError: return 5",
    "no environment": "import os\n    return 5 if not {'SECRET', 'PYTHONPATH'} & set(os.environ) else 0",
    "empty folder": "import os\n    return 5 if os.listdir('.') == [] else 0",
    "cannot write outside": (
        "import os\n    for p in ('/etc/x', '/usr/x', '/root/x', '/var/x', '/x', '/dev/x'):\n"
        "        try: open(p, 'w')\n        except OSError: continue\n        return 0\n    return 5"
    ),
    "no large file": (
        "try:\n        with open('big', 'wb') as o:\n            for _ in range(64): o.write(bytes(1 << 20))\n"
        "    except OSError: return 5"
    ),
    "no new session": "import os\n    try: os.setsid()\n    except OSError: return 5",
    "cannot signal others": (
        "import os\n    try: os.kill(" + str(os.getpid()) + ", 0)\n    except OSError: return 5"
    ),
    "cannot raise limits": (
        "import resource\n    try: resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
        "    except (OSError, ValueError): return 5"
    ),
    "few processes": (
        "import os\n    try:\n        for _ in range(40):\n            if os.fork() == 0:\n"
        "                import time; time.sleep(60)\n    except OSError: return 5"
    ),
    "no 10 GB": "try: bytearray(10 ** 10)\n    except MemoryError: return 5",
}  # fmt: skip


@pytest.mark.parametrize("what", CONTAINED)
def test_jail_holds(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    code = f"def f(x):\n    {CONTAINED[what]}"
    assert run_tests([code], [TEST], LIMITS) == [True]


@pytest.mark.parametrize("mode", WORKING[1:])
def test_jail_without_bubblewrap_holds(mode: Mode) -> None:
    names = [name for name in CONTAINED if mode != "limits" or name != "cannot signal others"]
    bodies = [f"def f{i}(x):\n    {CONTAINED[name]}" for i, name in enumerate(names)]
    tests = [f"assert f{i}(2) == 5" for i in range(len(names))]
    verdicts = run_tests(["\n".join(bodies)], tests, GENEROUS, mode)
    assert dict(zip(names, verdicts, strict=True)) == dict.fromkeys(names, True)


@pytest.mark.parametrize("mode", WORKING)
def test_limits_are_in_force(mode: Mode) -> None:
    limits = Limits(test_seconds=5.0, total_seconds=20.0, processes=11, file=5 << 20)
    wanted = {
        "RLIMIT_DATA": limits.memory, "RLIMIT_AS": limits.memory + SHARED, "RLIMIT_CPU": 21,
        "RLIMIT_FSIZE": limits.file, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0, "RLIMIT_MSGQUEUE": 0,
    }  # fmt: skip
    if os.getuid() == 0:
        wanted["RLIMIT_NPROC"] = limits.processes
    code = "import resource\ndef f(name): return resource.getrlimit(getattr(resource, name))"
    tests = [f"assert f({name!r}) == ({most}, {most})" for name, most in wanted.items()]
    verdicts = run_tests([code], tests, limits, mode)
    assert dict(zip(wanted, verdicts, strict=True)) == dict.fromkeys(wanted, True)


@pytest.mark.parametrize("mode", CONTAINING)
def test_processes_of_the_machine_are_hidden(mode: Mode) -> None:
    code = "import os\ndef f(): return sorted(int(p) for p in os.listdir('/proc') if p.isdigit())"
    assert run_tests([code], ["assert f() == [1, 2]"], GENEROUS, mode) == [True]


@pytest.mark.parametrize("mode", CONTAINING)
def test_rights_and_namespaces_cannot_be_had(mode: Mode) -> None:
    code = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def rights(): return [l.split()[1] for l in open('/proc/self/status')"
        " if l.startswith(('CapPrm', 'CapEff', 'CapBnd', 'CapAmb'))]\n"
        "def clone(flags): return libc.syscall(56, flags | 17, 0, 0, 0, 0)\n"
        "def mount(): return libc.mount(b'x', b'/tmp', b'tmpfs', 0, None)\n"
        "def unshare(): return libc.unshare(0x10000000)"
    )
    tests = ["assert rights() == ['0' * 16] * 4", "assert mount() == unshare() == -1"]
    tests += ["assert clone(0x10000000) == clone(0x00020000) == -1"] * (
        os.uname().machine == "x86_64"
    )
    assert all(run_tests([code], tests, GENEROUS, mode))


@pytest.mark.parametrize("mode", WORKING)
def test_jail_has_none_of_the_standard_streams(mode: Mode) -> None:
    """What is waiting at the trainer's input is not read, and nothing gets to its output."""
    warm.close_jails()
    code = (
        "import os\ndef f():\n    for fd in (1, 2): os.write(fd, b'x' * 9)\n"
        "    print('x')\n    return os.read(0, 9)"
    )
    waiting, written = os.pipe(), os.pipe()
    kept = [os.dup(fd) for fd in range(3)]
    os.write(waiting[1], b"secret")
    try:
        for fd, end in enumerate((waiting[0], written[1], written[1])):
            os.dup2(end, fd)
        verdict = run_tests([code], ["assert f() == b''"], GENEROUS, mode)
    finally:
        for fd, end in enumerate(kept):
            os.dup2(end, fd)
            os.close(end)
    os.write(written[1], b"end")
    assert verdict == [True] and os.read(written[0], 99) == b"end"
    for end in (*waiting, *written):
        os.close(end)


@pytest.mark.parametrize("mode", CONTAINING)
def test_files_of_the_machine_are_hidden_and_none_can_be_written(mode: Mode) -> None:
    """Whoever's they are: of the user that runs this, too."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        Path(folder).chmod(0o777)
        secret = Path(folder) / "secret"
        secret.write_text("x")
        secret.chmod(0o666)
        hidden = [str(secret), __file__, str(Path.home() / "."), "/etc/passwd", "/var"]
        code = (
            "import os, sys\n"
            "def seen(paths): return [p for p in paths if os.path.exists(p) and os.listdir(p)]\n"
            "def written():\n    found = []\n"
            "    for top in ('/', '/dev', '/proc', '/usr', '/sandbox', sys.base_prefix, os.__file__):\n"
            "        for folder, names, _ in os.walk(top):\n"
            "            names[:] = [n for n in names if n not in ('scratch', 'proc', 'shm')][:20]\n"
            "            try: open(folder + '/x', 'w')\n            except OSError: continue\n"
            "            found.append(folder)\n"
            "            if len(found) > 5: break\n    return found\n"
        )
        tests = [f"assert seen({[p for p in hidden if not Path(sys.base_prefix).is_relative_to(p)]}) == []",
                 "assert written() == []"]  # fmt: skip
        limits = Limits(test_seconds=60.0, total_seconds=90.0)
        assert run_tests([code], tests, limits, mode) == [True, True]
        assert secret.read_text() == "x"


@pytest.mark.parametrize("mode", CONTAINING)
def test_all_files_together_are_limited(mode: Mode) -> None:
    """Those in /dev/shm, in the folder for temporary files and empty ones among them."""
    code = (
        "import tempfile\ndef f(count, size):\n    for i in range(count):\n"
        "        folder = ('.', '/dev/shm', tempfile.gettempdir())[i % 3]\n"
        "        try: open(f'{folder}/{i}', 'wb').write(bytes(size))\n"
        "        except OSError: return i"
    )
    tests = ["assert 10 < f(40, 1 << 20) <= 16", "assert f(9999, 0) < 5000"]
    assert run_tests([code], tests, GENEROUS, mode) == [True, True]


@pytest.mark.parametrize("mode", WORKING)
def test_a_very_deep_folder_is_a_failed_test_and_nothing_else(mode: Mode) -> None:
    deep = (
        "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\n"
        "open('x', 'w').close()\ndef f(x): return 4"
    )
    before = set(Path(tempfile.gettempdir()).glob("sandbox_*"))
    assert run_tests([deep], [TEST], GENEROUS, mode) == [False]
    assert run_tests(["def f(x): return 5"], [TEST], GENEROUS, mode) == [True]
    end = time.monotonic() + 20
    while not (left := set(Path(tempfile.gettempdir()).glob("sandbox_*"))) <= before:
        assert time.monotonic() < end, left
        time.sleep(0.1)


@pytest.mark.parametrize("mode", WORKING)
def test_standard_modules_and_packages_can_be_imported(mode: Mode) -> None:
    """Wherever Python lies, in a folder that only its user may enter, too."""
    modules = sorted(sys.stdlib_module_names - {"antigravity", "this", "nt", "ntpath", "idlelib"})
    modules = [name for name in modules if not name.startswith("_") and _found(name)]
    code = (
        "from __future__ import annotations\nimport importlib\n"
        "def missing(names):\n    found = []\n    for name in names:\n"
        "        try: importlib.import_module(name)\n"
        "        except Exception as error: found.append((name, str(error)))\n    return found"
    )
    tests = [
        f"assert missing({modules}) == []",
        "assert missing(['numpy', 'encodings.idna']) == []",
    ]
    limits = Limits(test_seconds=60.0, total_seconds=120.0)
    assert run_tests([code], tests, limits, mode) == [True, True]


def _found(name: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):
        importlib.import_module(name)
        return True
    return False


@pytest.mark.skipif(WORKING[0] == "limits", reason="needs a jail with a file system of its own")
def test_python_may_lie_below_the_folder_for_temporary_files(tmp_path: Path) -> None:
    """The jail's own folder for temporary files does not hide it."""
    root = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        python = root / "python"
        shutil.copytree(sys.base_prefix, python, symlinks=True,
                        ignore=shutil.ignore_patterns("test", "site-packages", "share", "idlelib"))  # fmt: skip
        program = (
            "from megatron_espo.sandbox import run\n"
            "modes = [m for m in run.MODES if m != 'limits']\n"
            "for mode in modes:\n    try:\n"
            "        print(run.run_tests(['import tempfile\\ndef f():\\n    return tempfile.TemporaryFile()"
            ".write(b\"xxxxx\")'], ['assert f() == 5'], None, mode))\n"
            "    except OSError as error: print(mode, error)"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [python / "bin" / Path(sys.executable).resolve().name, "-c", program],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        wanted = [mode for mode in WORKING if mode != "limits"]
        assert done.stdout.splitlines().count("[True]") == len(wanted), done.stdout
    finally:
        shutil.rmtree(root)


def test_locked_in_process_is_closed_to_others_of_its_user() -> None:
    """Where two processes have one user, one could else rewrite the other's memory (/proc)."""
    program = (
        "import ctypes, sys\n"
        "from megatron_espo.sandbox.jail.limits import lock_in\n"
        "before = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)\n"  # PR_GET_DUMPABLE
        "lock_in({'memory': 1 << 30, 'cpu': 9, 'processes': 9, 'file': 9, 'user': 0, 'running': 99,"
        " 'open': 0})\n"
        "sys.exit(10 * before + ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert done.returncode == 10


# What must end, and leave nothing behind.
ENDLESS = {
    "loop": "while True: pass",
    "loop at exit": "import atexit\natexit.register(lambda: [0 for _ in iter(int, 1)])\nwhile True: pass",
    "sleep": "import time\ntime.sleep(600)",
    "deaf": "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass",
    "power": "9 ** 9 ** 9",
    "output": "while True: print('x' * 10 ** 6)",
    "stderr": "import sys\nwhile True: sys.stderr.write('x' * 10 ** 6)",
    "memory": "v = []\nwhile True: v.append(bytearray(10 ** 7))",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(600,)).start()\n    except RuntimeError: pass",
    "orphan": "import os, time\nif os.fork() == 0:\n    if os.fork() == 0: time.sleep(600)\n    os._exit(0)\ntime.sleep(600)",
    "recursion": "def g(): g()\ng()",
    "waits for input": "input()",
    "catastrophic pattern": "import re\nre.match('(a+)+b', 'a' * 40)",
    "nested code": "eval('(' * 150 + ')' * 150)",
    "files": "i = 0\nwhile True:\n    open(str(i), 'w').write('x')\n    i += 1\n    if i > 500: i = 0",
}  # fmt: skip


OWN = Limits(test_seconds=1.0, total_seconds=1.5, memory=256 << 20)


def inside(jail: int) -> set[int]:
    """Processes that descend from a jail's first, or have a user that only its own have."""
    parents, found = {}, {jail}
    users = range(warm._FIRST_USER + (os.getpid() * 65_536) % 90_000_000, 2**31)
    users = users[:65_536]
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            state, parent = path.joinpath("stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z":  # it has ended; the jail has not looked yet
                continue
            parents[int(path.name)] = int(parent)
            if path.stat().st_uid in users:
                found.add(int(path.name))
    for _ in range(12):
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def at_rest(jail: int) -> set[int]:
    """What is inside a jail that has nothing to do, once it has prepared for what comes next."""
    end, found = time.monotonic() + 10, inside(jail)
    while time.monotonic() < end:
        time.sleep(0.3)
        before, found = found, inside(jail)
        if found == before:
            break
    return found


def left_over(jail: int, idle: set[int]) -> set[int]:
    end = time.monotonic() + 5
    while (found := inside(jail) - idle) and time.monotonic() < end:
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("mode", MODE_MARKS)
@pytest.mark.parametrize("program", ENDLESS)
def test_endless_code_ends_in_time_and_leaves_no_process(program: str, mode: Mode) -> None:
    jail = warm.warm_jail(mode)._process.pid
    idle = at_rest(jail)
    started = time.monotonic()
    assert run_tests([ENDLESS[program] + "\ndef f(x): return 4"], [TEST], OWN, mode) == [False]
    assert time.monotonic() - started < 30
    assert warm.warm_jail(mode)._process.pid == jail
    assert left_over(jail, idle) == set()


@pytest.mark.parametrize("mode", WORKING)
def test_jails_end_with_the_process_that_made_them_however_it_ends(mode: Mode) -> None:
    program = (
        "from megatron_espo.sandbox import run, warm\n"
        f"print(warm.warm_jail({mode!r})._process.pid, flush=True)\n"
        "limits = warm.Limits(test_seconds=60.0, total_seconds=60.0)\n"
        f"run.run_tests(['import time\\ntime.sleep(600)'], ['f()'], limits, {mode!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    ) as maker:
        assert maker.stdout
        jail = int(maker.stdout.readline())
        end = time.monotonic() + 20
        while len(found := inside(jail)) < 4 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(found) >= 4
        time.sleep(0.5)  # until they are locked in
        maker.kill()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


def test_total_time_is_limited_whatever_the_number_of_tests() -> None:
    started = time.monotonic()
    code = "def f(x):\n    while x: pass\n    return 0"
    limits = Limits(test_seconds=1.0, total_seconds=3.0)
    assert (
        run_tests([code], ["assert f(0) == 0"] + ["assert f(1)"] * 2000, limits)
        == [True] + [False] * 2000
    )
    assert time.monotonic() - started < 30
    # A single test has no more than that, either.
    limits, code = Limits(test_seconds=60.0, total_seconds=2.0), "from time import sleep as f"
    assert run_tests([code], ["f(600)"], limits) == [False]
    assert time.monotonic() - started < 50
