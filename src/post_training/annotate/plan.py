"""The plan of a run: its input rows in one file, cut into chunks, and what the run is.

    RUN/chunks/input.jsonl     every good row of the inputs, in order (data/branches.py)
               rejects.jsonl   the bad ones, under on_error: quarantine
               manifest.json   stage, recipe, inputs, image, topology; by chunk: its rows, bytes,
                               sha256, and the sha256 of its conversation_ids; sources: what
                               was read of each dataset's rows; written last

The first worker writes it while the others wait; it depends on the inputs and the recipe alone.
Who comes later must be of the same run, or is refused with the setting that differs.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from post_training.annotate.config import ChunkedStageConfig
from post_training.core.errors import PostTrainingError
from post_training.core.files import atomic_file, read_json, write_json
from post_training.core.hashing import sha256_value
from post_training.core.locks import locked
from post_training.data.branches import ID, branch_row, row_line
from post_training.data.formats.columns import ColumnReport, describe_columns
from post_training.data.reading import (
    Reader,
    Rejected,
    Verdicts,
    name_of,
    open_sources,
    read_chunks,
)
from post_training.data.rows import BadRow
from post_training.data.sources import Chunk as SourceChunk
from post_training.records.run import RunDescription, check_same_run
from post_training.stages.context import StageContext

SCHEMA = "post-training/chunks/1"
INPUT, REJECTS, MANIFEST = "input.jsonl", "rejects.jsonl", "manifest.json"


@dataclass(frozen=True)
class Chunk:
    """Rows [first_row, first_row + num_rows) of input.jsonl, its bytes [start, start + size).

    sha256: of these bytes. ids_sha256: of the rows' conversation_ids, in order.
    """

    number: int
    first_row: int
    num_rows: int
    start: int
    size: int
    sha256: str
    ids_sha256: str

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


@dataclass(frozen=True)
class Plan:
    """folder: RUN/chunks. identity: sha256 of what decides the bytes of every chunk. rejected: rows
    that are not among the input, by reason. sources: what was read of each dataset's rows."""

    folder: Path
    identity: str
    chunks: tuple[Chunk, ...]
    rejected: dict[str, int]
    sources: list[dict[str, Any]] | None  # None: of a plan that an older version wrote

    @property
    def num_rows(self) -> int:
        return sum(chunk.num_rows for chunk in self.chunks)

    def key(self, chunk: Chunk) -> str:
        """What the chunk's output is made from, in one hash."""
        return sha256_value([self.identity, chunk.number, chunk.sha256])

    def read_input(self, chunk: Chunk) -> list[bytes]:
        """The chunk's input lines. Errors: PostTrainingError when they are not what was planned."""
        path = self.folder / INPUT
        with open(path, "rb") as file:
            file.seek(chunk.start)
            content = file.read(chunk.size)
        if hashlib.sha256(content).hexdigest() != chunk.sha256:
            raise PostTrainingError(
                f"chunk {chunk.number}: the rows have changed since they were planned",
                where=str(path),
                hint="remove the run folder, and begin anew",
            )
        return content.splitlines(keepends=True)


def ids_sha256(ids: list[str]) -> str:
    """Of conversation_ids, in order."""
    return sha256_value(ids)


def make_plan(folder: Path, config: ChunkedStageConfig, context: StageContext) -> Plan:
    """The plan in `folder`, made now if there is none.

    Errors: those of the data; UsageError when the plan there is another run's.
    """
    description = context.description
    assert description is not None
    folder.mkdir(parents=True, exist_ok=True)
    said = "data: waiting for the worker that reads the inputs"
    with locked(folder / ".plan.lock", lambda: context.log(said)):
        if not (folder / MANIFEST).exists():
            _write_plan(folder, config, description, context)
    return _read_plan(folder, config.version, description, context)


def _read_plan(folder: Path, version: int, now: RunDescription, context: StageContext) -> Plan:
    path = folder / MANIFEST
    manifest = read_json(path, SCHEMA)
    changed = check_same_run(
        path, manifest["run"], now, allow_topology=context.allow_topology_change
    )
    if changed:
        context.log(f"warning: the chunks were begun with another topology: {'; '.join(changed)}")
    if manifest["version"] != version:
        raise PostTrainingError(
            f"the chunks are of another version of the stage: {manifest['version']} -> {version}",
            where=str(path),
            hint="choose another run_dir",
        )
    identity = {
        "stage": now.stage,
        "version": version,
        "recipe": now.recipe,
        "inputs": now.input_fingerprints,
    }
    return Plan(
        folder,
        sha256_value(identity),
        tuple(Chunk(**chunk) for chunk in manifest["chunks"]),
        manifest["rejected"],
        manifest.get("sources"),
    )


def _write_plan(
    folder: Path,
    config: ChunkedStageConfig,
    description: RunDescription,
    context: StageContext,
) -> None:
    chunks: list[Chunk] = []
    sources: list[dict[str, Any]] = []
    first_row = start = 0
    with (
        Verdicts(config.data.on_error, folder / REJECTS) as verdicts,
        atomic_file(folder / INPUT) as path,
        open(path, "wb") as file,
    ):
        lines = _read_rows(config, verdicts, context, sources)
        while rows := list(islice(lines, config.chunk_rows)):
            content = b"".join(line for _, line in rows)
            file.write(content)
            chunks.append(
                Chunk(
                    len(chunks),
                    first_row,
                    len(rows),
                    start,
                    len(content),
                    hashlib.sha256(content).hexdigest(),
                    ids_sha256([row_id for row_id, _ in rows]),
                )
            )
            first_row += len(rows)
            start += len(content)
        if not chunks:
            raise PostTrainingError(f"no row is left to annotate: {verdicts.summary()}")
        context.inputs.check()
    run = {key: getattr(description, key) for key in ("stage", "recipe", "topology", "inputs")}
    write_json(
        folder / MANIFEST,
        {
            "schema": SCHEMA,
            "version": config.version,
            "run": {**run, "image": description.image},
            "rejected": verdicts.counts,
            "sources": sources,
            "chunks": [asdict(chunk) for chunk in chunks],
        },
    )
    context.log(f"data: {first_row:,} rows in {len(chunks):,} chunks of {config.chunk_rows:,}")
    if verdicts.counts:
        context.log(f"data: {verdicts.summary()}")


@dataclass(frozen=True)
class _Conversion:
    """What the processes that convert rows are given. keeps_pairs: preference rows stay as they
    are; else they become branches."""

    reader: Reader
    names: tuple[str, ...]
    keeps_pairs: bool

    def convert_row(self, value: dict[str, Any], dataset: int) -> dict[str, Any]:
        found = self.reader.formats[dataset]
        if self.keeps_pairs and found.name == "preference":
            from post_training.data.preference_rows import preference_row  # it needs jinja2

            return preference_row(value, found)
        return branch_row(value, found, self.names[dataset])


@dataclass(frozen=True)
class _Converted:
    """rows: (conversation_id, line) of each good one, and where it is from."""

    dataset: int
    rows: list[tuple[str, bytes, Rejected]]
    rejected: list[Rejected]


def _convert_chunk(state: _Conversion, item: tuple[int, SourceChunk]) -> _Converted:
    dataset, chunk = item
    result = _Converted(dataset, [], [])
    for record in state.reader.records(chunk, dataset):
        try:
            for value in state.reader.values(record, dataset):
                row = state.convert_row(value, dataset)
                # What is said of a row that turns out to be one too many.
                twice = BadRow("duplicate", f"a second row {row[ID]}")
                place = Rejected(record.place, twice, record.raw)
                result.rows.append((row[ID], row_line(row), place))
        except BadRow as bad:
            result.rejected.append(Rejected(record.place, bad, record.raw))
    return result


def _read_rows(
    config: ChunkedStageConfig,
    verdicts: Verdicts,
    context: StageContext,
    told: list[dict[str, Any]],
) -> Iterator[tuple[str, bytes]]:
    """(conversation_id, line) of every good row, in the order of the inputs.

    told: gets what was read of each dataset's rows, at the end; no file's name, which decides no
    bytes.
    """
    data = config.data
    sources, formats = open_sources(data, for_training=False)
    names = tuple(name_of(dataset) for dataset in data.datasets)
    for name, found in zip(names, formats, strict=True):
        context.log(f"data: {name} is read as {found.describe()}")
    num_rows = [0] * len(sources)
    seen: set[bytes] = set()
    reader = Reader(data, formats, for_training=False)
    if data.deduplicate == "near" or data.decontaminate is not None:
        # Only here: it needs numpy, which the host has not.
        from post_training.data.cleaning.cleaning import with_cleaning

        reader = with_cleaning(reader, sources, context.run_dir, context.log)
    state = _Conversion(reader, names, config.keeps_pairs)
    report = ColumnReport(formats, {ID: "id"})
    for chunk in read_chunks(_convert_chunk, state, sources, data, num_rows.__getitem__, report):
        for rejected in chunk.rejected:
            verdicts.reject(rejected.place, rejected.bad, rejected.raw)
        for row_id, line, place in chunk.rows:
            if data.debug_subsample == num_rows[chunk.dataset]:
                break
            # 16 bytes each: a set of the ids themselves would be most of the memory.
            digest = hashlib.blake2b(row_id.encode(), digest_size=16).digest()
            if digest in seen:
                if data.deduplicate:
                    verdicts.count("duplicate")
                else:
                    verdicts.reject(place.place, place.bad, place.raw)
                continue
            seen.add(digest)
            num_rows[chunk.dataset] += 1
            yield row_id, line
    told += report.sources(num_rows)
    for name, source in zip(names, told, strict=True):
        for words in describe_columns({"name": name, **source}, unread="kept as metadata"):
            context.log(f"data: {words}")
