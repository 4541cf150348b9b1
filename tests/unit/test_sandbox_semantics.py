# ruff: noqa: E501  (programs on one line)
"""Tests see Python's own semantics: right programs pass, wrong ones do not,
and no verdict is forged.

Plain Python, which runs program and test one after the other, is the oracle for the first two.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_espo.sandbox.run import run_tests
from megatron_espo.sandbox.warm import Limits, Mode
from tests.unit.programs import MODE_MARKS, programs

pytestmark = pytest.mark.slow

LIMITS = Limits(test_seconds=30.0, total_seconds=120.0)
RIGHT = {name: rest for name, *rest in programs("right")}
WRONG = {name: rest for name, *rest in programs("wrong")}
HOSTILE = {name: code for name, code, _ in programs("hostile")}

# What hostile programs are asked. None of them knows an answer, so that every pass is forged.
QUESTIONS = [
    "assert f(2) == 5",
    "assert 5 == f(2)",
    "assert not f(2) != 5",
    "assert f(2) == 5, 'f(2) is five'",
    "assert f(2) in (5, 6)",
    "assert set([f(2)]) == {5}",
    "assert [f(2), 1] == [5, 1]",
    "assert abs(f(2) - 5) < 1e-6",
    "assert round(f(2), 2) == 5.0",
    "assert f(2) >= 5 and f(2) <= 5 and f(2) == 5",
    "assert isinstance(f(2), int) and f(2) == 5",
    "import math\nassert math.isclose(f(2), 5)",
    "assert sorted(f(2)) == [1, 2]",
    "assert str(f(2)) == 'five'",
    "assert f(2)[0] == 5 and len(f(2)) == 1",
    "assert all(f(n) == n + 3 for n in range(3))",
    "y = f(2)\nassert y == 5",
    "x = [1]\nf(x)\nassert x == [5]",
    "for n, want in [(2, 5), (3, 6)]:\n    assert f(n) == want",
    "try:\n    assert f(2) == 5\nexcept ZeroDivisionError:\n    pass",
    "def check(c):\n    for n in range(3):\n        want = 7 * n + 1\n        assert c(n) == want\ncheck(f)",
    "def check(c, n=2):\n    assert c(n) == 5\n    return None\ncheck(f)",
    "import asyncio\nasync def main():\n    assert f(2) == 5\nasyncio.run(main())",
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Whether each program passes its tests in plain Python, every test in a fork of its own."""
    program = (
        "import os, sys\n"
        "from tests.unit.programs import programs\n"
        "for kind in ('right', 'wrong'):\n"
        "    for name, code, tests in programs(kind):\n"
        "        passed = True\n"
        "        for test in tests:\n"
        "            child = os.fork()\n"
        "            if not child:\n"
        "                space = {'__name__': 'solution'}\n"
        "                sys.modules['solution'] = module = type(os)('solution')\n"
        "                try:\n"
        "                    exec(code, module.__dict__)\n"
        "                    exec(test, module.__dict__)\n"
        "                except BaseException:\n"
        "                    os._exit(1)\n"
        "                os._exit(0)\n"
        "            passed &= os.waitpid(child, 0)[1] == 0\n"
        "        print(kind, name, passed, sep='\\t', flush=True)\n"
    )
    root = Path(__file__).parents[2]
    # Its working folder is the programs': some of them write files.
    run = f"import sys; sys.path.insert(0, {str(root)!r})\n{program}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", run], capture_output=True, text=True, check=True,
        cwd=tmp_path_factory.mktemp("plain"),
    )  # fmt: skip
    lines = [line.split("\t") for line in done.stdout.splitlines() if line.count("\t") == 2]
    return {f"{kind} {name}": passed == "True" for kind, name, passed in lines}


def test_plain_python_agrees_with_the_tables(plain: dict[str, bool]) -> None:
    assert len(RIGHT) >= 120 and len(WRONG) >= 25 and len(HOSTILE) >= 41
    expected = {f"right {name}": True for name in RIGHT} | {f"wrong {n}": False for n in WRONG}
    assert {name: plain.get(name) for name in expected} == expected


@pytest.mark.parametrize("mode", MODE_MARKS)
def test_right_programs_pass(mode: Mode) -> None:
    failed = {
        name: verdicts
        for name, (code, tests) in RIGHT.items()
        if not all(verdicts := run_tests([code], tests, LIMITS, mode))
    }
    assert not failed


@pytest.mark.parametrize("mode", MODE_MARKS)
def test_wrong_programs_fail(mode: Mode) -> None:
    passed = [
        n for n, (code, tests) in WRONG.items() if all(run_tests([code], tests, LIMITS, mode))
    ]
    assert not passed


@pytest.mark.parametrize("mode", MODE_MARKS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_forge_nothing(name: str, mode: Mode) -> None:
    limits = Limits(test_seconds=3.0, total_seconds=40.0)
    verdicts = run_tests([HOSTILE[name]], QUESTIONS, limits, mode)
    assert [q for q, passed in zip(QUESTIONS, verdicts, strict=True) if passed] == []


def test_every_question_has_an_answer() -> None:
    """The right values pass, so that a question which nothing can pass is none."""
    answers = {
        "sorted": "[2, 1]", "str": "type('S', (), {'__str__': lambda s: 'five'})()", "[0]": "[5]",
        "7 * n": "7 * x + 1", "f(x)": "x.__setitem__(0, 5)",
    }  # fmt: skip
    for question in QUESTIONS:
        body = next((code for key, code in answers.items() if key in question), "x + 3")
        assert run_tests([f"def f(x): return {body}"], [question], LIMITS) == [True], question


@pytest.mark.parametrize("mode", MODE_MARKS)
def test_no_completion_sees_what_another_has_left(mode: Mode) -> None:
    """Not in the files, the modules, the environment or the processes of a warm jail.

    In "limits" the machine's folders for temporary files are everybody's.
    """
    folders = "()" if mode == "limits" else "(tempfile.gettempdir(), '/dev/shm')"
    poison = (
        "import builtins, math, os, sys, tempfile, time\n"
        "builtins.abs = lambda v: 7\nmath.pi = 3\nos.environ['X'] = '1'\nsys.path.insert(0, '.')\n"
        "open('statistics.py', 'w').write('poisoned = 1')\n"
        f"for folder in {folders}:\n"
        "    try: open(folder + '/left', 'w').write('x')\n    except OSError: pass\n"
        "if os.fork() == 0:\n    time.sleep(600)\n"
        "def f(x): return 5"
    )
    clean = (
        "import math, os, sys, tempfile\ndef f():\n    import statistics\n"
        "    return [abs(0), round(math.pi, 2), 'X' in os.environ, hasattr(statistics, 'poisoned'),\n"
        "            os.listdir('.'), os.path.exists(tempfile.gettempdir() + '/left'), '.' in sys.path]"
    )
    for _ in range(2):
        assert run_tests([poison], ["assert f(2) == 5"], LIMITS, mode) == [True]
        test = "assert f() == [0, 3.14, False, False, [], False, False]"
        assert run_tests([clean], [test], LIMITS, mode) == [True]


PROGRAMS = {
    "reads a number": ("n = int(input())\nprint(n * 2)", True),
    "main block": ("if __name__ == '__main__':\n    print(int(input()) * 2)", True),
    "reads all": ("import sys\nprint(2 * int(sys.stdin.read()))", True),
    "reads the file": ("print(2 * int(open(0).readline()))", True),
    "leaves": ("print(int(input()) * 2)\nexit()", True),
    "leaves with success": ("import sys\nprint(int(input()) * 2)\nsys.exit(0)", True),
    "space at the ends": ("print('', int(input()) * 2, '  \\n\\n')", True),
    "writes": ("import sys\nsys.stdout.write(str(2 * int(sys.stdin.readline())))", True),
    "bytes": ("import os, sys\nos.write(1, b'%d' % (2 * int(sys.stdin.buffer.read())))", True),
    "wrong": ("print(int(input()) * 3)", False),
    "too much": ("print(int(input()) * 2)\nprint(1)", False),
    "fails after printing": ("print(int(input()) * 2, flush=True)\nraise ValueError", False),
    "leaves with failure": ("print(int(input()) * 2)\nexit(1)", False),
    "is killed": ("import os\nprint(6, flush=True)\nos.kill(os.getpid(), 9)", False),
    "prints nothing": ("input()", False),
    "only defines": ("def solve(n): return 2 * n", False),
    "reads too much": ("print(int(input()) * 2)\ninput()", False),
    "hangs": ("print(int(input()) * 2, flush=True)\nwhile True: pass", False),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_judged_by_what_they_print(name: str) -> None:
    code, right = PROGRAMS[name]
    tests = [{"input": "3\n", "output": "6\n"}, {"input": "40", "output": "80"}]
    limits = Limits(test_seconds=2.0, total_seconds=9.0)
    assert run_tests([code], tests, limits) == [right] * 2


def test_programs_share_no_state() -> None:
    code = "import os\nprint(os.listdir('.'))\nopen('x', 'w').close()\nos.remove('x')"
    assert run_tests([code], [{"input": "", "output": "[]"}] * 2, LIMITS) == [True, True]
