"""What a run shows and what it keeps: nothing is lost, little is shown, an error comes last."""

import json
import logging
import sys
from pathlib import Path

import pytest

from megatron_espo.console import captured, rank_log, say
from megatron_espo.errors import UserError
from megatron_espo.monitor import progress
from megatron_espo.monitor.training_lines import training_line
from megatron_espo.startup import setup

# As Megatron-Core 0.19.2 prints them.
STEP = (
    " [2026-11-29 12:00:00.123456] iteration      120/     400 | consumed samples:         3840 | "
    "elapsed time per iteration (ms): 250.0 | learning rate: 2.500000E-03 | "
    "global batch size:    32 | lm loss: 3.100000E+00 | loss scale: 1.0 | grad norm: 1.250 | "
    "number of skipped iterations:   {} | number of nan iterations:   0 |"
)
LINES = {
    STEP.format(0): "iteration 120/400 | learning rate: 2.500000E-03 | lm loss: 3.100000E+00 | "
    "grad norm: 1.250 | 250.0 ms | left 1m10s",
    STEP.format(2): "iteration 120/400 | learning rate: 2.500000E-03 | lm loss: 3.100000E+00 | "
    "grad norm: 1.250 | number of skipped iterations: 2 | 250.0 ms | left 1m10s",
    " validation loss at iteration 4 on validation set | lm loss value: 4.1E+00 | "
    "lm loss PPL: 6.1E+01 | ": "validation loss at iteration 4 on validation set | "
    "lm loss value: 4.1E+00 | lm loss PPL: 6.1E+01",
    "  [2026-11-29 12:28:19.402784] successfully saved checkpoint from iteration       6 to run "
    "[ t 1/1, gtp_remat 1/1, p 1/1 ]": "successfully saved checkpoint from iteration 6 to run",
    "  successfully loaded checkpoint from run [ t 1/1, gtp_remat 1/1, p 1/1 ] at iteration 6":
        "successfully loaded checkpoint from run at iteration 6",
    "[exiting program after receiving SIGTERM.] datetime: 2026-11-29 12:00:00.123456 ":
        "exiting program after receiving SIGTERM",
    "    will not load any checkpoints and will start from random":
        "No checkpoint to go on from: what is trained begins anew.",
    "warning: tracker was cut short": "warning: tracker was cut short",
    "  adam_beta1 ...................................... 0.9": None,
    "WARNING: could not find the metadata file run/latest_checkpointed_iteration.txt": None,
    "[before the start of training step] datetime: 2026-11-29 12:00:00 ": None,
}  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_of_megatrons_lines_the_console_shows_what_a_person_follows(line: str) -> None:
    assert training_line(line) == LINES[line]


def test_a_line_of_fine_tuning_says_how_many_epochs_are_done() -> None:
    shown = str(training_line(STEP.format(0), epoch=1500, epochs=3.0))
    assert shown.startswith("iteration 120/400 | epoch 2.56/3 | learning rate")
    assert "| epoch 2.56 |" in str(training_line(STEP.format(0), epoch=1500))


def noisy() -> None:
    print("many\narguments")
    sys.stderr.write("half a ")
    sys.stderr.write("line\n")
    logging.getLogger().warning("logged")
    print("warning: of the project's own")
    say("rollout 1/3")


NOISE = ("many", "arguments", "half a line", "logged", "rollout 1/3", "project's own")


@pytest.mark.parametrize("verbose", [False, True])
def test_everything_is_in_the_log_and_little_on_the_console(
    verbose: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bound to its stream before anything is captured, as Megatron's is.
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(handler)
    with captured(training_line) as output:
        noisy()
        output.settle(rank_log(tmp_path / "run"), ["espo", "--lr", "1 2"], verbose)
        noisy()
    logging.getLogger().removeHandler(handler)
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    assert "espo --lr '1 2'" in log and all(log.count(part) >= 2 for part in NOISE)
    assert log.index("logged") < log.index("rollout 1/3", log.index("logged"))
    shown = capsys.readouterr().out
    for part in NOISE[:-2]:
        assert shown.count(part) == (2 if verbose else 0), part
    assert shown.count("rollout 1/3") == shown.count("warning: of the project's own") == 2


def test_a_second_start_goes_on_in_the_same_log(tmp_path: Path) -> None:
    for number in (1, 2):
        with captured() as output:
            output.settle(rank_log(tmp_path), ["start", str(number)], False)
            print(f"of start {number}")
    log = rank_log(tmp_path).read_text()
    assert log.count("\n===") == 2 and log.index("of start 1") < log.index("start 2")


def test_before_anything_is_decided_a_fault_shows_what_led_to_it_and_a_mistake_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(RuntimeError), captured():
        print("what led to it")
        raise RuntimeError("a fault")
    assert "what led to it" in capsys.readouterr().err
    with pytest.raises(UserError), captured():
        print("a list of arguments")
        raise UserError("--lr is missing.")
    assert capsys.readouterr() == ("", "")


def test_a_traceback_is_in_the_log_and_on_the_console(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), captured() as output:
        output.settle(rank_log(tmp_path), [], False)
        raise RuntimeError("a fault")
    log = rank_log(tmp_path).read_text()
    assert "Traceback" in log and "RuntimeError: a fault" in log
    assert sys.stdout.fileno() != -1, "streams are as they were, for Python's own traceback"


def test_a_log_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/logs"), captured() as output:
        output.settle(rank_log(tmp_path / "file"), [], False)


def test_torchrun_repeats_a_users_mistake_at_the_end_of_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    setup._tell_torchrun("error: --lr is missing.")
    assert json.loads(path.read_text())["message"]["message"] == "error: --lr is missing."
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    report = str(ChildFailedError("job", {0: failure})).rstrip("=\n ")
    assert report.endswith("traceback : error: --lr is missing.")


def test_long_work_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    heartbeat = progress.Heartbeat("sampling", interval=60)
    for second in range(151):
        now[0] = 100.0 + second
        heartbeat.beat()
    assert capsys.readouterr().out == "sampling: for 1m00s so far\nsampling: for 2m00s so far\n"
