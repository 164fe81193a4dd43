"""What W&B keeps of a run that is offline, read back from its own file."""

import json
import struct
from pathlib import Path
from typing import Any


def offline_folders(run_dir: Path) -> list[Path]:
    return list((run_dir / "wandb").glob("offline-run-*"))


def wandb_records(folder: Path, run_id: str) -> list[Any]:
    """The records of W&B's own file: 7 bytes, then a log of blocks of 32 KiB, in which a record is
    a chunk (kind 1) or a first, middle ones and a last (2, 3, 4), each after 7 bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = (folder / f"run-{run_id}.wandb").read_bytes()
    assert data[:4] == b":W&B"
    position, parts, records = 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_rows(folder: Path, run_id: str) -> dict[int, dict[str, float]]:
    """{step: {name: value}} of a run's history; a step that is there twice fails."""
    rows: dict[int, dict[str, float]] = {}
    for record in wandb_records(folder, run_id):
        if record.WhichOneof("record_type") != "history":
            continue
        items = _items(record.history.item)
        step = items["_step"]
        assert step not in rows
        rows[step] = {name: value for name, value in items.items() if "/" in name}
    return rows


def wandb_config(folder: Path, run_id: str) -> dict[str, Any]:
    """As the run began, and what was changed of it."""
    config: dict[str, Any] = {}
    for record in wandb_records(folder, run_id):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config |= _items(record.run.config.update)
        elif kind == "config":
            config |= _items(record.config.update)
    return config


def wandb_summary(folder: Path, run_id: str) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for record in wandb_records(folder, run_id):
        if record.WhichOneof("record_type") == "summary":
            summary |= _items(record.summary.update)
    return summary


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
