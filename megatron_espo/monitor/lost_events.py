"""Takes what a run wrote after its last checkpoint out of its event files, before it goes on.

A run that was killed has written events that no checkpoint knows of, and will write them again.
TensorBoard's Python code drops them where the continuation is marked, but only in files that it has
not read yet; its default data server takes no notice of marks, and keeps the points of every tag
that is not written again.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

_NAME = "tfevents"

IsLost = Callable[[str, int], bool]
"""(tag, step) -> whether the run will write this point again."""


def remove_lost_events(folder: str | os.PathLike[str], is_lost: IsLost) -> list[Path]:
    """Take lost points out of all event files of a folder.

    A file that held some is replaced as a whole; as it was, it stays beside the new one under a
    name that TensorBoard does not read ("lost" for "tfevents").

    Args:
        folder: of one run, as given to its SummaryWriter.
        is_lost: see above.

    Returns:
        The files as they were.
    """
    kept_whole = []
    for path in sorted(Path(folder).glob(f"*{_NAME}*")):
        if not any(_cut(event, is_lost) for event in _read(path)):
            continue
        scratch = path.with_name(f".{path.name.replace(_NAME, 'cut')}.tmp")
        with scratch.open("wb") as file:
            writer = RecordWriter(file)
            for event in _read(path):
                _cut(event, is_lost)
                if event.WhichOneof("what") != "summary" or event.summary.value:
                    writer.write(event.SerializeToString())
            writer.flush()
            os.fsync(file.fileno())
        whole = _unused(path.with_name(path.name.replace(_NAME, "lost")))
        # The file's own name is never missing, whenever this ends.
        try:
            os.link(path, whole)
        except OSError:  # a file system without links
            shutil.copy2(path, whole)
        os.replace(scratch, path)
        kept_whole.append(whole)
    return kept_whole


def _read(path: Path) -> Iterator[Event]:
    """Read events up to a record that was cut short, which ends a file for every reader."""
    for record in RawEventFileLoader(str(path)).Load():
        yield Event.FromString(record)


def _cut(event: Event, is_lost: IsLost) -> bool:
    """Take lost points out of an event; returns whether there were any."""
    values = [value for value in event.summary.value if not is_lost(value.tag, event.step)]
    if len(values) == len(event.summary.value):
        return False
    del event.summary.value[:]
    event.summary.value.extend(values)
    return True


def _unused(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}.{number}")
    return free
