"""Reward workers: same scores in any order, replaced when they hang or die, light, never left."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_espo.errors import UserError
from megatron_espo.rewards.workers import Failures, RewardError, RewardWorkers, collect
from megatron_espo.tasks import Example, Score, code, load_task, sudoku
from megatron_espo.tasks.base import start_line

ROOT = Path(__file__).parents[2]
TASK = """
import os, signal, sys, time
from pathlib import Path
from megatron_espo.tasks import Score

name = "told"

def read(path):
    return []

def score(example, completion):
    what, _, argument = completion.partition(" ")
    if what == "sleep":
        time.sleep(float(argument))
    elif what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "die-once":
        flag = Path(argument)
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    elif what == "raise":
        raise RuntimeError("the reward server is gone")
    elif what == "fill":
        raise MemoryError
    elif what == "pid":
        return Score(float(os.getpid()), True, {})
    elif what == "leave-child-and-die":
        os.posix_spawn("/bin/sleep", ["sleep", "20"], os.environ)
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "partly":
        return Score(0.5, False, {})
    elif what == "turns":
        assert isinstance(example.prompt, tuple) and isinstance(example.prompt[0], dict)
        return Score(float(len(example.prompt)), True, {})
    elif what == "stdin":
        return Score(float(len(sys.stdin.read())), True, {})
    elif what == "return":
        return eval(argument)
    elif what == "print":
        print("chatter", flush=True)
    return Score(float(example.answer["n"]), True, {"length": len(completion)})
"""

Pool = Callable[..., RewardWorkers]


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    (tmp_path / "told_task.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("told_task", None)
    made = []

    def make(num_workers: int = 2, timeout: float = 30.0) -> RewardWorkers:
        made.append(RewardWorkers(load_task("told_task"), "told_task", num_workers, timeout))
        return made[-1]

    yield make
    for workers in made:
        workers.close()
        assert workers.processes() == []


def example(n: int) -> Example:
    return Example("p", {"n": n})


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_scores_are_those_of_the_task_in_the_order_asked_for(pool: Pool) -> None:
    workers = pool(3)
    jobs = [
        workers.submit(example(n), "sleep 0.05" if n % 5 == 0 else "é\ud800") for n in range(30)
    ]
    scores = collect(jobs)
    assert [score.reward for score in scores] == list(range(30))
    assert scores[1].metrics == {"length": 2.0} and scores[1].correct
    assert len(workers.processes()) == 3
    assert workers.score(example(1), "partly") == Score(0.5, False, {})
    assert workers.take_failures() == Failures(0, 0)


def test_chat_prompts_arrive_as_turns(pool: Pool) -> None:
    turns = tuple({"role": role, "content": "?"} for role in ("system", "user"))
    assert pool(1).score(Example(turns, {}), "turns").reward == 2.0


def test_chat_prompts_and_built_in_tasks_travel() -> None:
    workers = RewardWorkers(sudoku, "sudoku", 1, 30.0)
    puzzle = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
    problem = Example(({"role": "user", "content": "?"},), puzzle)
    try:
        for text in ("<answer>3142243142131324</answer>", "nothing"):
            assert workers.score(problem, text) == sudoku.score(problem, text)
    finally:
        workers.close()


def test_slow_completion_scores_zero_is_counted_and_does_not_hold_up_the_others(pool: Pool) -> None:
    workers = pool(2, timeout=1.5)
    texts = ["ok", "sleep 600", "ok", "sleep 600", "ok"]
    scores = collect([workers.submit(example(7), text) for text in texts])
    assert [score.reward for score in scores] == [7.0, 0.0, 7.0, 0.0, 7.0]
    assert not scores[1].correct
    assert workers.take_failures() == Failures(timeouts=2, crashes=0)
    assert workers.take_failures() == Failures(0, 0)


def test_killed_worker_is_replaced_and_its_completion_scored_anew(
    pool: Pool, tmp_path: Path
) -> None:
    workers = pool(1)
    first = workers.score(example(0), "pid").reward
    assert workers.score(example(5), f"die-once {tmp_path / 'flag'}").reward == 5.0
    assert workers.score(example(0), "pid").reward != first
    assert workers.take_failures() == Failures(timeouts=0, crashes=1)


def test_worker_killed_from_outside_while_idle_or_at_work_is_replaced(pool: Pool) -> None:
    workers = pool(1)
    pid = int(workers.score(example(0), "pid").reward)
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not alive(pid))
    assert workers.score(example(3), "ok").reward == 3.0
    job = workers.submit(example(4), "sleep 1")
    (pid,) = workers.processes()
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    assert job.result().reward == 4.0
    assert workers.take_failures() == Failures(timeouts=0, crashes=2)


@pytest.mark.parametrize("text", ["die", "fill"])
def test_completion_that_kills_its_worker_twice_scores_zero(pool: Pool, text: str) -> None:
    workers = pool(1)
    assert workers.score(example(5), text).reward == 0.0
    assert workers.score(example(6), "ok").reward == 6.0
    assert workers.take_failures() == Failures(timeouts=0, crashes=2)


def test_child_that_a_dead_worker_leaves_holds_nothing_up(pool: Pool) -> None:
    workers = pool(1, timeout=10.0)
    assert workers.score(example(5), "leave-child-and-die").reward == 0.0
    assert workers.take_failures() == Failures(timeouts=0, crashes=2)


def limits(pid: int) -> dict[str, str]:
    """Soft limits of a process by name."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): line[26:].split()[0] for line in lines}


def test_built_in_tasks_have_a_limit_on_memory_and_no_worker_dumps_core(pool: Pool) -> None:
    own, (soft, hard) = limits(os.getpid()), resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    told = pool(1)
    try:
        told.score(example(0), "ok")
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    (pid,) = told.processes()
    found = limits(pid)
    assert found["Max core file size"] == "0"
    assert found["Max address space"] == own["Max address space"]

    built_in = RewardWorkers(sudoku, "sudoku", 1, 30.0)
    try:
        puzzle = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
        built_in.score(Example("", puzzle), "")
        (pid,) = built_in.processes()
        assert limits(pid)["Max address space"] == str(4 << 30)
    finally:
        built_in.close()


def test_exception_of_a_score_arrives_with_its_type_and_message(pool: Pool) -> None:
    workers = pool(2)
    jobs = [workers.submit(example(0), text) for text in ("ok", "raise", "ok")]
    with pytest.raises(RewardError, match="RuntimeError: the reward server is gone") as caught:
        collect(jobs)
    assert "told_task.py" in str(caught.value)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("{'reward': 1.0}", "score returned {'reward': 1.0} (dict); return a megatron_espo"),
        ("Score(float('nan'), True, {})", "the reward is nan (float); make it a finite number"),
        ("Score(1.0, True, {'mean': 1.0})", "a metric is called 'mean', a name that is reserved"),
    ],
)
def test_a_score_that_cannot_be_used_is_a_mistake_in_one_sentence_and_cancels_the_rest(
    pool: Pool, returned: str, message: str
) -> None:
    workers = pool(1)
    texts = (f"return {returned}", "sleep 3", "ok", "ok")
    jobs = [workers.submit(example(7), text) for text in texts]
    with pytest.raises(UserError) as caught:
        collect(jobs)
    assert str(caught.value).startswith(f'task told, record {{"n": 7}}: {message}')
    assert "\n" not in str(caught.value)
    assert jobs[2].cancelled() and jobs[3].cancelled()


def test_first_exception_cancels_what_waits(pool: Pool) -> None:
    workers = pool(1)
    jobs = [workers.submit(example(0), text) for text in ("raise", "sleep 3", "ok", "ok")]
    with pytest.raises(RewardError):
        collect(jobs)
    assert jobs[2].cancelled() and jobs[3].cancelled()
    # The worker passes over what was cancelled.
    assert workers.submit(example(8), "ok").result(timeout=60).reward == 8.0


def test_task_that_workers_cannot_import_is_an_error_and_no_hang() -> None:
    workers = RewardWorkers(sudoku, "no_such_package.task", 1, 5.0)
    with pytest.raises(RewardError, match=r"(?s)cannot start: .*no_such_package"):
        workers.score(example(0), "x")
    workers.close()


def test_task_whose_import_ends_the_process_is_an_error_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ending_task.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    workers = RewardWorkers(sudoku, "ending_task", 1, 5.0)
    with pytest.raises(RewardError, match="ending_task cannot start: exit code 3"):
        workers.score(example(0), "x")
    workers.close()


def test_closing_ends_workers_at_work_and_cancels_what_waits(pool: Pool) -> None:
    workers = pool(1)
    workers.score(example(0), "ok")
    (pid,) = workers.processes()
    jobs = [workers.submit(example(0), "sleep 600") for _ in range(3)]
    assert wait_until(jobs[0].running)
    workers.close()
    assert not alive(pid) and workers.processes() == []
    assert jobs[1].cancelled() and jobs[2].cancelled()
    with pytest.raises(ValueError, match="closed"):
        workers.submit(example(0), "ok")


def trainer_says(folder: Path, code: str, **settings: Any) -> str:
    """Run a program with one worker, and return what it prints."""
    (folder / "told_task.py").write_text(TASK)
    beginning = (
        "import os, signal, time\n"
        "from megatron_espo.tasks import Example, load_task\n"
        "from megatron_espo.rewards.workers import RewardWorkers\n"
        "workers = RewardWorkers(load_task('told_task'), 'told_task', 1, 600.0)\n"
        "problem = Example('p', {'n': 0})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", beginning + code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"},
        capture_output=True, text=True, check=False, timeout=60, **settings,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_signal_for_the_group_of_the_trainer_passes_workers_by(tmp_path: Path) -> None:
    code = (
        "first = workers.score(problem, 'pid').reward\n"
        "job = workers.submit(problem, 'sleep 1')\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.killpg(0, signal.SIGINT)\n"
        "os.killpg(0, signal.SIGTERM)\n"
        "job.result()\n"
        "same = workers.score(problem, 'pid').reward == first\n"
        "print(same, workers.take_failures().crashes)\n"
        "workers.close()\n"
    )
    assert trainer_says(tmp_path, code, start_new_session=True) == "True 0\n"


def test_worker_has_nothing_to_read_from_the_terminal_of_the_trainer(tmp_path: Path) -> None:
    code = "print(workers.score(problem, 'stdin').reward, input())\nworkers.close()\n"
    assert trainer_says(tmp_path, code, input="typed\n") == "0.0 typed\n"


def test_trainer_that_ends_without_closing_waits_for_no_score(tmp_path: Path) -> None:
    code = (
        "workers.score(problem, 'ok')\n"
        "job = workers.submit(problem, 'sleep 600')\n"
        "while not job.running(): time.sleep(0.01)\n"
        "print(*workers.processes())\n"
    )
    pid = int(trainer_says(tmp_path, code))
    assert wait_until(lambda: not alive(pid))


def test_worker_whose_parent_is_gone_already_ends() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker = subprocess.Popen(
            [sys.executable, "-m", "megatron_espo.rewards.worker", str(theirs.fileno()), "1"],
            cwd=ROOT, pass_fds=[theirs.fileno()],
        )  # fmt: skip
        try:
            assert worker.wait(60) == 0
        finally:
            worker.kill()


def test_workers_say_at_the_start_what_their_task_says() -> None:
    workers = RewardWorkers(code, "code", 1, 30.0)
    assert workers.start_line() == start_line(code)
    assert "sandbox" in str(workers.start_line())


def test_workers_import_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, megatron_espo.rewards.worker, megatron_espo.rewards.workers\n"
        "heavy = {'torch', 'megatron', 'numpy', 'transformers', 'sympy'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_workers_end_with_a_parent_that_is_killed_even_in_the_middle_of_a_score(
    tmp_path: Path,
) -> None:
    (tmp_path / "told_task.py").write_text(TASK)
    code = (
        "import time\n"
        "from megatron_espo.tasks import Example, load_task\n"
        "from megatron_espo.rewards.workers import RewardWorkers\n"
        "workers = RewardWorkers(load_task('told_task'), 'told_task', 2, 600.0)\n"
        "first = workers.score(Example('p', {'n': 0}), 'pid')\n"
        "jobs = [workers.submit(Example('p', {'n': 0}), 'sleep 600') for _ in range(2)]\n"
        "while len(workers.processes()) < 2: time.sleep(0.01)\n"
        "print(*workers.processes(), flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        parent.kill()
    assert wait_until(lambda: not any(map(alive, pids)))
