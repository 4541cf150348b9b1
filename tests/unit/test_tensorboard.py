"""What TensorBoard shows: each point once, by all of its readers; samples as they are."""

import os
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from torch.utils.tensorboard import SummaryWriter

from megatron_espo.monitor import tensorboard
from megatron_espo.monitor.tensorboard import begin_events, write_histograms
from megatron_espo.rl.samples_table import write_samples

Points = dict[str, list[tuple[int, float]]]


def start(folder: Path, number: int, resumed_at: int, end: int, **once: int) -> None:
    """One start of a run; ``once`` names tags that are written at a single step."""
    with SummaryWriter(str(folder), filename_suffix=f".{number}") as writer:
        # Readers go by the names, which hold a time in seconds.
        begin_events(writer, resumed_at)
        for step in range(resumed_at + 1, end + 1):
            writer.add_scalar("loss", number, step)
            write_histograms(writer, {"ratio": [number, number + 1.0]}, step)
            for tag, at in once.items():
                if step == at:
                    writer.add_scalar(tag, number, step)
                    writer.add_text(f"{tag}_text", str(number), step)
    for path in folder.glob(f"*tfevents*.{number}"):
        name = path.name.split(".")
        name[3] = str(1_000_000_000 + number)
        path.rename(path.with_name(".".join(name)))


EXPECTED: Points = {
    "loss": [(1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0), (5, 3.0)],
    "kept": [(2, 1.0)],
    "kept_2": [(3, 2.0)],
}


@pytest.fixture(params=["as written", "with a record that was cut short"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Killed before the first checkpoint; killed twice after a checkpoint; resumed to the end."""
    start(tmp_path, 0, 0, 3, lost_0=1)
    start(tmp_path, 1, 0, 4, kept=2, lost_1=4)
    if request.param != "as written":
        path = next(tmp_path.glob("*tfevents*.1"))
        os.truncate(path, path.stat().st_size - 5)
    start(tmp_path, 2, 2, 5, kept_2=3, lost_2=4)
    start(tmp_path, 3, 3, 5)
    return tmp_path


def test_event_accumulator_keeps_each_point_once(run: Path) -> None:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    assert {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    } == EXPECTED
    assert [e.histogram_value.min for e in events.Histograms("ratio")] == [1, 1, 2, 3, 3]


def test_the_server_in_python_keeps_each_point_once(run: Path) -> None:
    events = plugin_event_accumulator.EventAccumulator(str(run), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()["tensors"]
    assert set(tags) == {
        "loss", "kept", "kept_2", "ratio", "kept_text/text_summary", "kept_2_text/text_summary"
    }  # fmt: skip
    assert [e.step for e in events.Tensors("loss")] == [1, 2, 3, 4, 5]


def served(folder: Path) -> Points:
    """Read scalars through TensorBoard's data server, which it uses where it is installed."""
    server_ingester = pytest.importorskip("tensorboard.data.server_ingester")
    from tensorboard import context
    from tensorboard.util import grpc_util

    try:
        binary = server_ingester.get_server_binary()
    except server_ingester.NoDataServerError:
        pytest.skip("no data server here")
    ingester = server_ingester.SubprocessServerDataIngester(
        binary, str(folder), reload_interval=0,
        channel_creds_type=grpc_util.ChannelCredsType.LOCAL, samples_per_plugin={"scalars": 0},
    )  # fmt: skip
    ingester.start()
    found: Points = {}
    before: Points = {"": []}
    deadline = time.monotonic() + 60
    while (not found or found != before) and time.monotonic() < deadline:
        time.sleep(0.3)
        before = found
        runs = ingester.data_provider.read_scalars(
            context.RequestContext(), experiment_id="", plugin_name="scalars", downsample=1000
        )
        found = {
            tag: [(point.step, point.value) for point in points]
            for tags in runs.values()
            for tag, points in tags.items()
        }
    ingester._stdin_handle.close()
    return found


def test_the_data_server_keeps_each_point_once(run: Path) -> None:
    assert served(run) == EXPECTED


def test_a_server_that_runs_meanwhile_drops_what_it_had_read(tmp_path: Path) -> None:
    start(tmp_path, 1, 0, 4, lost=4)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("lost")] == [4]
    start(tmp_path, 2, 2, 3)
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 1), (3, 2)]
    assert [e.step for e in events.Scalars("lost")] == []


def test_files_stay_as_they_were_under_another_name(tmp_path: Path, capsys: Any) -> None:
    start(tmp_path, 1, 0, 4)
    before = next(tmp_path.glob("*tfevents*")).read_bytes()
    start(tmp_path, 2, 2, 4)
    assert f"1 event files held points after step 2; the files as they were are {tmp_path}" in (
        capsys.readouterr().out
    )
    assert [path.read_bytes() for path in tmp_path.glob("*lost*")] == [before]
    start(tmp_path, 3, 2, 4)
    assert len(list(tmp_path.glob("*lost*"))) == 2 and len(list(tmp_path.glob("*tfevents*"))) == 3
    assert not list(tmp_path.glob(".*")), "no scratch file is left"
    start(tmp_path, 4, 4, 4)  # a finished run that is started again
    assert len(list(tmp_path.glob("*lost*"))) == 2


def test_an_end_in_the_middle_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, 1, 0, 4)
    before = next(tmp_path.glob("*tfevents*")).read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for function in ("fsync", "link", "replace"):
        with monkeypatch.context() as patch, SummaryWriter(str(tmp_path / "other")) as writer:
            writer.log_dir = str(tmp_path)
            patch.setattr(f"megatron_espo.monitor.lost_events.os.{function}", killed)
            with pytest.raises(KeyboardInterrupt):
                begin_events(writer, 2)
        assert next(tmp_path.glob("*tfevents*")).read_bytes() == before, function
    start(tmp_path, 2, 2, 4)
    assert served(tmp_path)["loss"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_curves_against_samples_are_cut_by_samples(tmp_path: Path) -> None:
    for number, (step, end) in enumerate(((0, 4), (2, 3))):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{number}") as writer:
            begin_events(writer, step, samples=10 * step)
            for at in range(step + 1, end + 1):
                writer.add_scalar("loss", number, at)
                writer.add_scalar("loss" + tensorboard.VERSUS_SAMPLES, number, 10 * at)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert [e.step for e in events.Scalars("loss vs samples")] == [10, 20, 30]


class _Cells(HTMLParser):
    """Collects the text of a table's cells."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.cells: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "td":
            self.cells.append("")
        elif tag == "br":
            self.cells[-1] += "\n"

    def handle_data(self, data: str) -> None:
        if self.cells and data != "\n":
            self.cells[-1] += data


def as_rendered(text: str) -> _Cells:
    """A completion as TensorBoard's text plugin renders the table of samples."""
    written: list[str] = []
    writer = SimpleNamespace(add_text=lambda tag, table, step: written.append(table))
    rollout: Any = SimpleNamespace(
        rewards=torch.ones(1), scores=[SimpleNamespace(correct=True)], texts=[text],
        advantages=torch.zeros(1), completion_lengths=torch.ones(1, dtype=torch.long),
    )  # fmt: skip
    write_samples(writer, rollout, ["a prompt"], 1, 1)
    parser = _Cells()
    parser.feed(markdown_to_safe_html(written[0]))
    parser.close()
    return parser


CODE = "def f(a):\n    return a|b  # `x` \\| \\\\ **b** _c_ <b>&amp;</b>\n\n```\n[l](http://x) ~$\n"


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("|\\`*_<>&;#[]()!~$-+1.a \n") | st.characters(codec="utf-8")))
def test_samples_are_shown_as_they_are(text: str) -> None:
    for sample in (text, CODE):
        found = as_rendered(sample)
        assert len(found.cells) == 6 and found.cells[:2] == ["1.000", "yes"]
        if not sample:
            assert found.cells[5] == "(empty)"
            continue
        shown = "".join(
            c if c in " \n" else " " if c == "\xa0" else c if c.isprintable() else "\ufffd"
            for c in sample.expandtabs(4)
        )
        assert found.cells[5].replace("\xa0", " ") == shown
        assert not found.tags & {"code", "pre", "a", "em", "strong", "b", "img"}
