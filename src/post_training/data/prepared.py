"""A prepared dataset: a folder with `rows.arrow` (input_ids, labels) and `counts.json`.

The same rows give the same bytes: an Arrow stream in batches of a fixed size, no times, no paths.
It is read memory-mapped, so its size is bounded by the disk alone.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from post_training.core.files import atomic_directory, write_json
from post_training.data.tokenize import TokenizedRow

ROWS = "rows.arrow"
COUNTS = "counts.json"
_BATCH_SIZE = 1000


@dataclass(frozen=True)
class Counts:
    num_rows: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_truncated_rows: int = 0
    longest_row: int = 0

    def add(self, row: TokenizedRow) -> "Counts":
        return Counts(
            self.num_rows + 1,
            self.num_tokens + len(row.input_ids),
            self.num_trained_tokens + row.num_trained_tokens,
            self.num_truncated_rows + row.truncated,
            max(self.longest_row, len(row.input_ids)),
        )


def write_prepared(folder: Path, rows: Iterable[TokenizedRow]) -> Counts:
    """Write the dataset as a whole or not at all."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", ids), ("labels", ids)])
    counts = Counts()
    iterator = iter(rows)
    with atomic_directory(folder) as temporary:
        with (
            pa.OSFile(str(temporary / ROWS), "wb") as file,
            pa.ipc.new_stream(file, schema) as writer,
        ):
            while batch := list(islice(iterator, _BATCH_SIZE)):
                for row in batch:
                    counts = counts.add(row)
                columns = [[row.input_ids for row in batch], [row.labels for row in batch]]
                writer.write_batch(
                    pa.record_batch([pa.array(column, ids) for column in columns], schema=schema)
                )
        write_json(temporary / COUNTS, asdict(counts))
    return counts


def read_counts(folder: Path) -> Counts:
    return Counts(**json.loads((folder / COUNTS).read_text()))
