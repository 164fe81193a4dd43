"""One chunk's outcome: its rows, and the record that says the rows are all there.

RUN/chunks/000012.jsonl   the annotated rows
           000012.json    from what they were made (key), their sha256, who was rejected; last
           000012.lock    held by the worker that does it; a killed one lets go
           000012.log     only of trouble: what went wrong, with its traceback
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.core.files import read_json, write_atomic, write_json
from post_training.core.hashing import sha256_file
from post_training.core.locks import hold, locked
from post_training.data.branches import ID
from post_training.data.rows import BadRow
from post_training.stages.annotation.annotator import Row
from post_training.stages.annotation.plan import Chunk, Plan

SCHEMA = "post-training/chunk/1"


def rows_path(plan: Plan, chunk: Chunk) -> Path:
    return plan.folder / f"{chunk.name}.jsonl"


def log_path(plan: Plan, chunk: Chunk) -> Path:
    return plan.folder / f"{chunk.name}.log"


def is_done(plan: Plan, chunk: Chunk) -> bool:
    return _record_path(plan, chunk).exists()


@contextmanager
def claimed(plan: Plan, chunk: Chunk, *, wait: bool = False) -> Iterator[bool]:
    """Whether the chunk is this process's to do: nobody else holds it, and it is not done.

    wait: until whoever holds it has done it, or is gone.
    """
    path = plan.folder / f"{chunk.name}.lock"
    holding = locked(path) if wait else hold(path)
    if holding is None:
        yield False
        return
    with holding:
        try:
            yield not is_done(plan, chunk)
        finally:
            # Who opened it before now finds the chunk done, once it has the lock.
            if is_done(plan, chunk):
                path.unlink(missing_ok=True)


def write_chunk(
    plan: Plan,
    chunk: Chunk,
    inputs: list[Row],
    outputs: list[bytes | BadRow],
    counts: dict[str, int],
    timing: dict[str, Any],
) -> None:
    """Write the rows, then the record. outputs: of each input, its line or why there is none.
    counts: of the lines' rows, together: num_branches, and what the stage counts."""
    pairs = list(enumerate(zip(inputs, outputs, strict=True), chunk.first_row + 1))
    rejected = [
        {"row": number, ID: row[ID], "reason": output.reason, "problem": output.problem}
        for number, (row, output) in pairs
        if isinstance(output, BadRow)
    ]
    lines = [output for output in outputs if isinstance(output, bytes)]
    path = rows_path(plan, chunk)
    write_atomic(path, b"".join(lines))
    record = {
        "schema": SCHEMA,
        "key": plan.key(chunk),
        "sha256": sha256_file(path),
        "num_rows": len(lines),
        **counts,
        "rejected": rejected,
        "timing": timing,
        "process": os.getpid(),
    }
    write_json(_record_path(plan, chunk), record)


def read_chunk_record(plan: Plan, chunk: Chunk) -> dict[str, Any]:
    """Errors: PostTrainingError when it is missing, or was not made of this plan's chunk."""
    path = _record_path(plan, chunk)
    try:
        record = read_json(path, SCHEMA)
    except FileNotFoundError:
        raise broken(plan, chunk, "is missing") from None
    if record["key"] != plan.key(chunk):
        raise broken(plan, chunk, "was made of other rows or settings")
    return record


def broken(plan: Plan, chunk: Chunk, problem: str) -> PostTrainingError:
    return PostTrainingError(
        f"chunk {chunk.number} {problem}",
        where=str(rows_path(plan, chunk)),
        hint=f"remove {plan.folder / chunk.name}.json and start again: the chunk is done anew",
    )


def _record_path(plan: Plan, chunk: Chunk) -> Path:
    return plan.folder / f"{chunk.name}.json"
