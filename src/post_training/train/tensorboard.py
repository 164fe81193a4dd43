"""The lines of metrics.jsonl as TensorBoard shows them: one event file, written line by line.

Not by torch's SummaryWriter: that one has a thread and a queue, shows the error of a full disk
later or never, and loses up to two minutes of lines when it is killed.
"""

import os
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from post_training.train.reporters import Line, scalars


class TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: BinaryIO | None = None

    def start(self, lines: Sequence[Line]) -> None:
        self._folder.mkdir(exist_ok=True)
        earlier = list(self._folder.glob("*.tfevents.*"))
        # A TensorBoard that is open reads the files of a folder in the order of their names.
        path = self._folder / f"events.out.tfevents.{time.time_ns()}"
        self._file = open(path, "xb")  # noqa: SIM115 - until `close`
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # It then forgets what it read from the files before.
        restart = SessionLog(status=SessionLog.START)
        self._append(Event(wall_time=time.time(), step=0, session_log=restart))
        for line in lines:
            self.write(line)
        for file in earlier:
            os.truncate(file, 0)  # not removed: one that is open would wait for it forever

    def write(self, line: Line) -> None:
        values = [
            Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(line).items()
        ]
        written_at = datetime.fromisoformat(line["timing"]["time"]).timestamp()
        summary = Summary(value=values)
        self._append(Event(wall_time=written_at, step=line["step"], summary=summary))

    def close(self, *, failed: bool) -> None:
        self._file.close()

    def _append(self, event: Event) -> None:
        RecordWriter(self._file).write(event.SerializeToString())
        self._file.flush()
