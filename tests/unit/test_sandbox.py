# ruff: noqa: E501  (programs on one line)
"""The sandbox: honest code passes, dishonest code does not, hostile code harms nothing."""

import contextlib
import errno
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_espo.sandbox import run as sandbox
from megatron_espo.sandbox.jail.values import decode, encode
from megatron_espo.sandbox.run import MODES, Limits, run_tests

LIMITS = Limits(test_seconds=2.0, total_seconds=5.0, memory=512 << 20)
TEST = "assert f(2) == 5"


def works(mode: str) -> bool:
    generous = Limits(test_seconds=20.0, total_seconds=20.0)
    with contextlib.suppress(OSError):  # its program is not installed
        return run_tests(["def f(x): return 5"], [TEST], generous, mode) == [True]
    return False


WORKING = [mode for mode in MODES if works(mode)]


def test_some_mode_works_and_says_what_it_leaves_open() -> None:
    assert sandbox.sandbox_mode() == WORKING[0]
    line = sandbox.start_line()
    assert line.startswith(f"sandbox: {WORKING[0]}")
    assert ("machine's files" in line) == (WORKING[0] != "bubblewrap")


@pytest.mark.parametrize("missing", [["bwrap"], ["bwrap", "unshare"]], ids="-".join)
def test_missing_programs_leave_the_next_mode(
    missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = sandbox._prefix

    def without(mode: sandbox.Mode, limits: Limits, *, root: bool) -> list[str]:
        found = prefix(mode, limits, root=root)
        return [f"/nowhere/{part}" if Path(part).name in missing else part for part in found]

    monkeypatch.setattr(sandbox, "_prefix", without)
    expected = next(mode for mode in MODES[len(missing) :] if mode in WORKING)
    assert sandbox.sandbox_mode.__wrapped__() == expected


def test_a_jail_that_ends_at_once_is_a_failed_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernel refuses namespaces: its socket is closed before or while it is used."""
    monkeypatch.setattr(sandbox, "_prefix", lambda *_, **__: ["/bin/false"])
    large = "x = 1\n" * 10**6  # more than the socket holds: sending it fails, surely
    for code in ("def f(x): return 5", large):
        assert run_tests([code], [TEST], LIMITS, "namespaces") == [False]


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
    assert run_tests([code], tests, Limits(test_seconds=2.0)) == [v == "1" for v in verdicts]


@pytest.mark.parametrize("mode", WORKING)
def test_every_mode_gives_the_same_verdicts(mode: str) -> None:
    for case in ("function", "class", "imports", "test imports", "one test crashes"):
        code, tests, verdicts = HONEST[case]
        assert run_tests([code], tests, Limits(test_seconds=3.0), mode) == [
            v == "1" for v in verdicts
        ]


# Code that would pass without the right value. Every one must fail.
DISHONEST = {
    "exit at import": "import sys\nsys.exit(0)",
    "exit in call": "import sys\ndef f(x): sys.exit(0)",
    "hard exit at import": "import os\nos._exit(0)",
    "hard exit in call": "import os\ndef f(x): os._exit(0)",
    "equals everything": (
        "class A:\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x): return A()"
    ),
    "equals everything, int": (
        "class A(int):\n    def __eq__(self, o): return True\n    def __index__(self): return 5\n"
        "def f(x): return A(4)"
    ),
    "class in place of a function": (
        "class f:\n    def __init__(self, x): pass\n    def __eq__(self, o): return True"
    ),
    "patches builtins": (
        "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\n"
        "builtins.compile = builtins.exec = lambda *a: None\ndef f(x): return 4"
    ),
    "reads the caller's frame": (
        "import sys\ndef f(x):\n    k = sys._getframe()\n    while k:\n"
        "        for c in k.f_code.co_consts:\n"
        "            if k.f_code.co_filename == '<test>' and type(c) is int and c > x: return c\n"
        "        k = k.f_back"
    ),
    "reads all objects": (
        "import gc\ndef f(x):\n    for o in gc.get_objects():\n"
        "        for e in o if isinstance(o, list) else o.values() if isinstance(o, dict) else ():\n"
        "            if isinstance(e, str) and e.startswith('assert f'): return int(e[-1])"
    ),
    "searches the files": (
        "import os, glob\ndef f(x):\n    for p in glob.glob('/proc/[0-9]*/cmdline'):\n"
        "        if b'f(2) ==' in open(p, 'rb').read(): return 5"
    ),
    "says that it passed": (
        "import os, json, struct\nfor fd in range(3, 64):\n    for m in ({'test': 0, 'passed': True},"
        " {'loaded': True}, {'value': None}):\n        d = json.dumps(m).encode()\n"
        "        try: os.write(fd, struct.pack('!Q', len(d)) + d)\n        except OSError: pass"
    ),
    "says so in the call": (
        "import os, json, struct\ndef f(x):\n    d = json.dumps({'test': 0, 'passed': True}).encode()"
        "\n    for fd in range(3, 64):\n        try: os.write(fd, struct.pack('!Q', len(d)) + d * 2)"
        "\n        except OSError: pass"
    ),
    "prints success": "def f(x): print('passed True 1.0 OK'); return None",
    "writes garbage": "import os\ndef f(x):\n    for fd in range(3, 20):\n        try: os.write(fd, b'x' * 99)\n        except OSError: pass",
    "claims a huge message": (
        "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'\\xff' * 8)\n"
        "    except OSError: pass\ndef f(x): return 4"
    ),
    "replaces the test's names": "def check(*a): pass\ntests = passed = True\ndef f(x): return 4",
    "traces": "import sys\nsys.settrace(lambda *a: None)\nsys.setrecursionlimit(50)\ndef f(x): return 4",
    "ends at exit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 4",
    "stops iteration": "def f(x): raise StopIteration",
    "never defines f": "g = 5",
    "f is the answer": "f = 5",
    "deep value": "def f(x):\n    v = []\n    for _ in range(10 ** 5): v = [v]\n    return v",
    "endless iterator": "import itertools\ndef f(x): return itertools.count()",
    "nan": "def f(x): return float('nan')",
}  # fmt: skip


@pytest.mark.parametrize("attack", DISHONEST)
def test_dishonest_code_does_not_pass(attack: str) -> None:
    assert run_tests([DISHONEST[attack]], [TEST], LIMITS) == [False]


def test_code_cannot_replace_what_a_test_uses_to_compare() -> None:
    code = "def abs(x): return 0\ndef all(v): return True\ndef set(v): return 1\ndef f(x): return 4"
    tests = [
        "assert abs(f(2) - 5) < 1",
        "assert all(f(x) == 5 for x in [2])",
        "assert set([f(2)]) == {5}",
    ]
    assert run_tests([code], tests, LIMITS) == [False, False, False]
    code = "import math\nmath.isclose = lambda *a: True\ndef f(x): return 4"
    assert run_tests([code], ["assert math.isclose(f(2), 5)"], LIMITS) == [False]
    code = "def f(x): raise StopIteration"
    assert run_tests([code], ["assert all(map(f, [2, 3])) and not list(map(f, [1]))"], LIMITS) == [
        False
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
def test_jail_without_bubblewrap_holds(mode: str) -> None:
    names = [name for name in CONTAINED if name != "cannot signal others"]
    bodies = [f"def f{i}(x):\n    {CONTAINED[name]}" for i, name in enumerate(names)]
    tests = [f"assert f{i}(2) == 5" for i in range(len(names))]
    verdicts = run_tests(["\n".join(bodies)], tests, Limits(test_seconds=5.0), mode)
    assert dict(zip(names, verdicts, strict=True)) == dict.fromkeys(names, True)


@pytest.mark.parametrize("mode", WORKING)
def test_limits_are_in_force(mode: str) -> None:
    limits = Limits(test_seconds=5.0, total_seconds=7.0, processes=11, file=5 << 20)
    wanted = {
        "RLIMIT_AS": limits.memory, "RLIMIT_CPU": 8, "RLIMIT_FSIZE": limits.file,
        "RLIMIT_NPROC": limits.processes, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0,
        "RLIMIT_MSGQUEUE": 0,
    }  # fmt: skip
    code = "import resource\ndef f(name): return resource.getrlimit(getattr(resource, name))"
    tests = [f"assert f({name!r}) == ({most}, {most})" for name, most in wanted.items()]
    verdicts = run_tests([code], tests, limits, mode)
    assert dict(zip(wanted, verdicts, strict=True)) == dict.fromkeys(wanted, True)


@pytest.mark.parametrize("mode", [mode for mode in WORKING if mode != "limits"])
def test_namespaces_hide_the_processes_of_the_machine(mode: str) -> None:
    code = "import os\ndef f(): return max(int(p) for p in os.listdir('/proc') if p.isdigit())"
    assert run_tests([code], ["assert f() < 20"], Limits(test_seconds=5.0), mode) == [True]


@pytest.mark.parametrize("mode", WORKING)
def test_jail_has_none_of_the_standard_streams(mode: str) -> None:
    """What is waiting at the trainer's input is not read, and nothing gets to its output."""
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
        verdict = run_tests([code], ["assert f() == b''"], Limits(test_seconds=5.0), mode)
    finally:
        for fd, end in enumerate(kept):
            os.dup2(end, fd)
            os.close(end)
    os.write(written[1], b"end")
    assert verdict == [True] and os.read(written[0], 99) == b"end"
    for end in (*waiting, *written):
        os.close(end)


@pytest.mark.skipif(WORKING[0] != "bubblewrap", reason="only bubblewrap mounts folders read-only")
def test_bubblewrap_lets_nothing_be_written_where_packages_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = sandbox._library()
    # Not below /tmp, of which the jail has its own.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o777)
        monkeypatch.setattr(sandbox, "_library", lambda: [*library, folder])
        code = (
            f"def f():\n    try: open({folder!r} + '/x', 'w')\n"
            "    except OSError as error: return error.errno"
        )
        assert run_tests([code], [f"assert f() == {errno.EROFS}"], LIMITS) == [True]


@pytest.mark.skipif(WORKING[0] != "bubblewrap", reason="only bubblewrap limits the sum of files")
def test_bubblewrap_limits_all_files_together() -> None:
    code = (
        "def f():\n    for i in range(40):\n        try: open(str(i), 'wb').write(bytes(1 << 20))\n"
        "        except OSError: return i"
    )
    limits = Limits(test_seconds=5.0, file=16 << 20)
    assert run_tests([code], ["assert 10 < f() <= 16"], limits) == [True]


def test_locked_in_process_is_closed_to_others_of_its_user() -> None:
    """Where two jails have one user, the code's could else rewrite the tests' memory (/proc)."""
    program = (
        "import ctypes, sys\n"
        "from megatron_espo.sandbox.jail.limits import lock_in\n"
        "before = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)\n"  # PR_GET_DUMPABLE
        "lock_in({'memory': 1 << 30, 'cpu': 9, 'processes': 9, 'file': 9, 'user': 0, 'preload': 0})\n"
        "sys.exit(10 * before + ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert done.returncode == 10


@pytest.mark.skipif(WORKING[0] != "bubblewrap", reason="other modes show the machine's files")
def test_bubblewrap_shows_no_file_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    code = f"import os\ndef f(): return [os.path.exists(p) for p in ({str(tmp_path)!r}, {__file__!r}, '/home', '/etc/passwd')]"
    assert run_tests([code], ["assert not any(f())"], LIMITS) == [True]


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


# A size that tells the processes of these jails from those of others on the machine.
OWN = Limits(test_seconds=1.0, total_seconds=1.5, memory=(256 << 20) + 4096 * (os.getpid() % 4096))


def own_processes() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if "code_side.py" in line and f'"memory": {OWN.memory},' in line:
                found.append(line)
    return found


def wait_for_none() -> bool:
    end = time.monotonic() + 5
    while own_processes() and time.monotonic() < end:
        time.sleep(0.05)
    return not own_processes()


def test_processes_of_a_jail_can_be_told_from_others() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, sandbox._jail("code_side.py", [theirs], OWN, WORKING[0]):
        assert own_processes()
    assert wait_for_none()


@pytest.mark.parametrize("program", ENDLESS)
def test_endless_code_ends_in_time_and_leaves_no_process(program: str) -> None:
    started = time.monotonic()
    assert run_tests([ENDLESS[program] + "\ndef f(x): return 4"], [TEST], OWN) == [False]
    assert time.monotonic() - started < 30
    assert wait_for_none()


@pytest.mark.parametrize("mode", WORKING[1:])
def test_other_modes_end_processes_too(mode: str) -> None:
    for program in ("fork bomb", "orphan", "deaf"):
        assert run_tests([ENDLESS[program]], [TEST], OWN, mode) == [False]
        assert wait_for_none()


@pytest.mark.parametrize("mode", WORKING)
def test_jails_end_with_the_process_that_made_them_however_it_ends(mode: str) -> None:
    program = (
        "from megatron_espo.sandbox.run import Limits, run_tests\n"
        f"limits = Limits(test_seconds=60.0, total_seconds=60.0, memory={OWN.memory})\n"
        f"run_tests(['import time\\ntime.sleep(600)'], ['f()'], limits, {mode!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as maker:
        end = time.monotonic() + 20
        while not own_processes() and time.monotonic() < end:
            time.sleep(0.05)
        assert own_processes()
        time.sleep(0.5)  # until it is locked in
        maker.kill()
    assert wait_for_none()


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


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary(max_size=9) | st.decimals(allow_nan=False) | st.fractions() | st.dates(),
    lambda inner: st.lists(inner, max_size=4)
    | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    | st.sets(st.integers() | st.text(), max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(PLAIN)
def test_values_arrive_as_they_were(value: object) -> None:
    back = decode(encode(value))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("endless", [itertools.count(), itertools.repeat("x", 10**6)])
def test_values_with_too_many_items_are_refused(endless: object) -> None:
    with pytest.raises(ValueError, match="too many items"):
        encode(endless)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)


@settings(max_examples=150, deadline=None)
@given(
    JSON
    | st.tuples(
        st.sampled_from(["int", "float", "dict", "set", "range", "builtin", "bytes", "Decimal"]),
        JSON,
    ).map(list)
)
def test_malformed_values_are_value_errors(value: object) -> None:
    with contextlib.suppress(ValueError):
        decode(value)
