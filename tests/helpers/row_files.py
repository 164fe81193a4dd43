"""Files of rows, written and read."""

import pickle
from pathlib import Path

from post_training.data.rows import Record
from post_training.data.sources.open import open_path


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
