"""Files of rows, written and read."""

import json
import pickle
from pathlib import Path
from typing import Any

from post_training.data.rows import Record
from post_training.data.sources.open import open_path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Of a JSONL file, or of the dataset that a stage left in the folder `path`."""
    if path.is_dir():
        path = path / "dataset/rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_records(path: Path, split: str | None = None) -> list[Record]:
    """The records of each chunk, as another process gets them."""
    return [
        record
        for chunk in open_path(path, split).chunks()
        for record in pickle.loads(pickle.dumps(chunk)).records()
    ]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
