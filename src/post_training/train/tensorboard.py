"""The lines of metrics.jsonl as TensorBoard shows them: one event file, written line by line.

Not by torch's SummaryWriter: that one has a thread and a queue, shows the error of a full disk
later or never, and loses up to two minutes of lines when it is killed.
"""

import json
import os
import textwrap
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from post_training.train.reporters import Line, scalars

_TEXT = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))


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

    def describe(
        self,
        settings: dict[str, Any],
        facts: dict[str, Any],
        figures: dict[str, float],
        *,
        step: int,
    ) -> None:
        """What is known once a run has ended: its settings and facts under "Text", and figures at
        its last step."""
        now = time.time()
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        for tag, content in (("settings", settings), ("run", facts)):
            # An indented block is code in Markdown, which it is shown as.
            text = textwrap.indent(json.dumps(content, indent=2, ensure_ascii=False), "    ")
            values.append(Summary.Value(tag=tag, metadata=_TEXT, tensor=_string(text)))
        self._append(Event(wall_time=now, step=step, summary=Summary(value=values)))

    def close(self, *, failed: bool) -> None:
        self._file.close()

    def _append(self, event: Event) -> None:
        RecordWriter(self._file).write(event.SerializeToString())
        self._file.flush()


def _string(text: str) -> TensorProto:
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    return TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
