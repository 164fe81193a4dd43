"""A worker: claim a chunk, annotate its rows, write it, until there is none to claim.

    RUN/chunks/000012.jsonl   the annotated rows
               000012.json    from what they were made (key), their sha256, who was rejected; last
               000012.lock    held by the worker that does it; a killed one lets go
               000012.log     only of trouble: what went wrong, with its traceback

What is wrong with a row the annotator says itself (BadRow). Where it fails, the engine or the model
is at fault: it is started anew, and the rows are halved until one is left, which is named and ends
the stage. Were that a bad row, quarantine would drop every row that an engine can't do. It is left
out only as far as max_failed_rows says.
"""

import json
import os
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from post_training.annotate.plan import Chunk, Plan
from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import read_json, write_atomic, write_json
from post_training.core.hashing import sha256_file
from post_training.core.locks import hold, locked
from post_training.data.branches import BRANCHES, ID, row_line
from post_training.data.reading import MEANT
from post_training.data.rows import SIDES, BadRow
from post_training.stages.context import Progress, StageContext

SCHEMA = "post-training/chunk/1"
Row = dict[str, Any]


class Annotator(ABC):
    """What a stage does to rows: the one thing that it brings itself.

    Made once in a process, and only if there is a chunk to do. What becomes of a row must not
    depend on the other rows of the call: chunks are cut otherwise in another run, and halved to
    find a row that fails.
    num_tokens: generated, scored or read so far; shown as a speed. num_truncated: samples that were
    cut off so far; None where a stage has none.
    """

    num_tokens: int = 0
    num_truncated: int | None = None

    @abstractmethod
    def __call__(self, rows: list[Row]) -> list[Row | BadRow]:
        """For each row, in order: the row with what the stage adds (the same conversation_id), or
        a BadRow: what is wrong with the row's data.

        Errors: each ends the stage: it is the engine's or the model's fault. One that is neither a
        PostTrainingError nor an OSError is tried again with half of the rows, to name a row.
        """

    def recover(self) -> None:  # noqa: B027 - most have nothing to do
        """Called after an exception, before the next call: an engine that died is started anew."""


@dataclass(frozen=True)
class WorkerPlace:
    """This worker is number `number` of `count`. waits: for the chunks that others hold."""

    number: int
    count: int
    waits: bool

    def order(self, chunks: tuple[Chunk, ...]) -> list[Chunk]:
        """Its own chunks, then the others, beginning after its own number: workers that have
        nothing left do not all look at the same chunk."""
        own = list(chunks[self.number :: self.count])
        others = [
            chunk
            for offset in range(1, self.count)
            for chunk in chunks[(self.number + offset) % self.count :: self.count]
        ]
        return own + others


@dataclass
class Worker:
    """Does chunks of `plan` in the order of its place.

    failed: chunks by their number, with what went wrong. num_failed_rows: at which the annotator
    failed. _seen: the numbers of chunks that are done, by whomever.
    """

    plan: Plan
    place: WorkerPlace
    make_annotator: Callable[[], Annotator]
    on_error: str
    max_failed_chunks: int
    max_failed_rows: int
    context: StageContext
    failed: dict[int, str] = field(default_factory=dict)
    num_done: int = 0
    num_failed_rows: int = 0
    _annotator: Annotator | None = None
    _seen: set[int] = field(default_factory=set)

    def run(self) -> None:
        """Errors: PostTrainingError when a chunk failed; UsageError at once."""
        plan, chunks = self.plan, self.place.order(self.plan.chunks)
        self._seen = {chunk.number for chunk in chunks if is_done(plan, chunk)}
        started_at, shown = time.monotonic(), self.context.ranks.is_writer
        with Progress("row", plan.num_rows, shown=shown, done=self._num_rows_done) as progress:
            for wait in (False, True) if self.place.waits else (False,):
                for chunk in chunks:
                    if chunk.number in self._seen or chunk.number in self.failed:
                        continue
                    self._do(chunk, wait=wait)
                    figures = self._figures(time.monotonic() - started_at)
                    progress.update(self._num_rows_done, figures)
        if self.failed:
            numbers = ", ".join(map(str, sorted(self.failed)))
            first = min(self.failed)
            raise PostTrainingError(
                f"chunks that failed: {numbers}; chunk {first}: {self.failed[first]}",
                where=str(log_path(plan, plan.chunks[first])),
                hint="the same command does these again, and nothing else",
            )

    @property
    def _num_rows_done(self) -> int:
        return sum(self.plan.chunks[number].num_rows for number in self._seen)

    def _figures(self, seconds: float) -> str:
        """`812 tokens/s, chunks: 3 of 9 done, 0 failed`."""
        num_tokens = self._annotator.num_tokens if self._annotator else 0
        words = [f"{num_tokens / seconds:,.0f} tokens/s"] if num_tokens else []
        words.append(f"chunks: {len(self._seen)} of {len(self.plan.chunks)} done")
        return ", ".join([*words, f"{len(self.failed)} failed"])

    def _do(self, chunk: Chunk, *, wait: bool) -> None:
        if wait and not is_done(self.plan, chunk):
            self.context.log(f"waiting for chunk {chunk.number}, which another worker holds")
        with claim(self.plan, chunk, wait=wait) as is_ours:
            if is_ours:
                try:
                    self._annotate(chunk)
                    self.num_done += 1
                except UsageError:
                    raise
                except PostTrainingError as error:
                    self._log(chunk, str(error))
                    self.failed[chunk.number] = error.problem
                    if len(self.failed) > self.max_failed_chunks:
                        raise
        if is_done(self.plan, chunk):
            self._seen.add(chunk.number)

    def _annotate(self, chunk: Chunk) -> None:
        inputs = [json.loads(line) for line in self.plan.read_input(chunk)]
        if self._annotator is None:
            self._annotator = self.make_annotator()
        started_at, tokens_before = time.monotonic(), self._annotator.num_tokens
        truncated_before = self._annotator.num_truncated
        attempt = _Attempt(self, self._annotator, chunk)
        lines = attempt.annotate(inputs)
        timing = {
            "seconds": time.monotonic() - started_at,
            "num_tokens": self._annotator.num_tokens - tokens_before,
        }
        self.context.inputs.check()
        counts = {"num_branches": attempt.num_branches}
        if truncated_before is not None:
            counts["num_truncated"] = self._annotator.num_truncated - truncated_before
        write_chunk(self.plan, chunk, inputs, lines, counts, timing)

    def _log(self, chunk: Chunk, text: str) -> None:
        with open(log_path(self.plan, chunk), "a", encoding="utf-8") as file:
            file.write(text.rstrip() + "\n")


@dataclass
class _Attempt:
    """One try at one chunk. num_branches: of the rows that were done."""

    worker: Worker
    annotator: Annotator
    chunk: Chunk
    num_branches: int = 0

    def annotate(self, rows: list[Row]) -> list[bytes | BadRow]:
        """Each row's line, or why there is none. Errors: PostTrainingError."""
        try:
            outputs = self.annotator(rows)
        except (PostTrainingError, OSError):
            raise  # It says itself what is wrong; a lost file system is no row's fault either.
        except Exception as error:
            what = f"{len(rows)} rows from {rows[0][ID]}"
            self.worker._log(self.chunk, f"{what}\n{traceback.format_exc()}")
            self.annotator.recover()
            if len(rows) > 1:
                half = len(rows) // 2
                return self.annotate(rows[:half]) + self.annotate(rows[half:])
            self.worker.num_failed_rows += 1
            if self.worker.num_failed_rows > self.worker.max_failed_rows:
                raise PostTrainingError(
                    f"the model or its engine failed at row {rows[0][ID]}: {_first_line(error)}",
                    where=str(log_path(self.worker.plan, self.chunk)),
                    hint="the row is not known to be bad, and data.on_error does not leave it out; "
                    f"max_failed_rows: {self.worker.num_failed_rows} does, once you know why",
                ) from None
            return self._to_lines(rows, [BadRow("failed", _first_line(error))])
        assert len(outputs) == len(rows), f"{len(rows)} rows became {len(outputs)}"
        return self._to_lines(rows, outputs)

    def _to_lines(self, rows: list[Row], outputs: list[Row | BadRow]) -> list[bytes | BadRow]:
        lines: list[bytes | BadRow] = []
        for row, output in zip(rows, outputs, strict=True):
            try:
                if isinstance(output, BadRow):
                    raise output
                assert output[ID] == row[ID], f"{row[ID]} became {output[ID]}"
                lines.append(row_line(output))
                self.num_branches += len(output.get(BRANCHES, SIDES))
            except BadRow as bad:
                if self.worker.on_error == "fail" and bad.reason not in MEANT:
                    raise PostTrainingError(
                        f"{row[ID]}: {bad.problem}",
                        where=f"chunk {self.chunk.number}",
                        hint="leave out such rows: data.on_error: skip, or quarantine",
                    ) from None
                lines.append(bad)
        return lines


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def rows_path(plan: Plan, chunk: Chunk) -> Path:
    return plan.folder / f"{chunk.name}.jsonl"


def log_path(plan: Plan, chunk: Chunk) -> Path:
    return plan.folder / f"{chunk.name}.log"


def is_done(plan: Plan, chunk: Chunk) -> bool:
    return _record_path(plan, chunk).exists()


@contextmanager
def claim(plan: Plan, chunk: Chunk, *, wait: bool = False) -> Iterator[bool]:
    """Lock the chunk, and yield whether it is this process's to do: nobody else holds it, and it is
    not done. wait: until whoever holds it has done it, or is gone.
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
    """Write the rows, then the record.

    outputs: of each input, its line or why there is none.
    counts: of the lines' rows, together: num_branches, and what the stage counts.
    timing: seconds and num_tokens of the work.
    """
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
    """The record of a chunk that is done.

    Errors: PostTrainingError when it is missing, or was not made of this plan's chunk.
    """
    path = _record_path(plan, chunk)
    try:
        record = read_json(path, SCHEMA)
    except FileNotFoundError:
        raise broken_chunk(plan, chunk, "is missing") from None
    if record["key"] != plan.key(chunk):
        raise broken_chunk(plan, chunk, "was made of other rows or settings")
    return record


def broken_chunk(plan: Plan, chunk: Chunk, problem: str) -> PostTrainingError:
    """The error of a chunk that can't be used. problem: what is wrong with it, after its number."""
    return PostTrainingError(
        f"chunk {chunk.number} {problem}",
        where=str(rows_path(plan, chunk)),
        hint=f"remove {plan.folder / chunk.name}.json and start again: the chunk is done anew",
    )


def _record_path(plan: Plan, chunk: Chunk) -> Path:
    return plan.folder / f"{chunk.name}.json"
