"""Folders that are there as a whole or not at all."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_espo.data.atomic_folder import atomic_folder


def test_a_folder_appears_when_it_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
        assert not out.exists()
    assert (out / "sub" / "file").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(143)])
def test_an_error_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old").write_text("x")
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "new").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_folder_with_content_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ValueError, match="exists and is not an empty folder"),
        atomic_folder(tmp_path),
    ):
        pass
    assert (tmp_path / "file").read_text() == "x"


def caused(error: Exception, context: Exception) -> Exception:
    error.__context__ = context
    return error


@pytest.mark.parametrize(
    "error",
    [
        # torch.save stumbles over its own half-written file.
        caused(RuntimeError("unexpected pos"), OSError(errno.ENOSPC, "No space left on device")),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(ValueError, match=r"--out .*: the disk is full; make room"),
        atomic_folder(tmp_path / "out"),
    ):
        raise error
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=999_000_000))
    with (
        pytest.raises(ValueError, match=r"1 GB are needed there and 0\.999 GB are free"),
        atomic_folder(tmp_path / "out", needed=1_000_000_000),
    ):
        pass
    assert not list(tmp_path.iterdir())
