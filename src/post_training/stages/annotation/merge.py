"""The chunks put together, each of them checked first.

A chunk must be of this plan (key), have the bytes that were written (sha256), and hold each of its
input's rows once and in order, but for those it says were rejected. So a row that was lost, doubled
or moved is found, whoever did it.
"""

import hashlib
import shutil
from collections import Counter
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.core.files import atomic_directory, write_atomic, write_json
from post_training.data.branches import ID, row_id
from post_training.data.rows import BadRow, Place
from post_training.data.verdicts import Verdicts
from post_training.models.reference import Reference
from post_training.stages.annotation.chunk_file import broken, read_chunk_record, rows_path
from post_training.stages.annotation.plan import INPUT, REJECTS, Chunk, Plan, ids_sha256
from post_training.stages.context import StageContext

ROWS, COUNTS = "rows.jsonl", "counts.json"


def merge(
    plan: Plan, on_error: str, reference: Reference | None, context: StageContext
) -> dict[str, Any]:
    """Write RUN/dataset, and RUN/rejects.jsonl under on_error: quarantine; the run's metrics.

    reference: whose log-probabilities the rows hold, if anybody's.

    Errors: PostTrainingError for a chunk that is missing or broken, and when no row is left.
    """
    target = context.run_dir / "dataset"
    shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed after writing it
    num_rows = num_branches = num_tokens = 0
    num_truncated: int | None = None
    seconds = 0.0
    rejects = plan.folder / "rejects_of_chunks.jsonl"
    with atomic_directory(target) as folder:
        with Verdicts(on_error, rejects) as verdicts, open(folder / ROWS, "wb") as file:
            for chunk in plan.chunks:
                record = read_chunk_record(plan, chunk)
                file.write(_checked(plan, chunk, record, verdicts))
                num_rows += record["num_rows"]
                num_branches += record["num_branches"]
                num_tokens += record["timing"]["num_tokens"]
                if "num_truncated" in record:  # not of chunks that older versions wrote
                    num_truncated = (num_truncated or 0) + record["num_truncated"]
                seconds += record["timing"]["seconds"]
        if not num_rows:
            raise PostTrainingError(f"no row is left: {verdicts.summary()}", where=str(plan.folder))
        counts: dict[str, Any] = {"num_rows": num_rows, "num_branches": num_branches}
        counts |= {"rejected": _added(plan.rejected, verdicts.counts)}
        if plan.sources is not None:
            counts["sources"] = plan.sources
        write_json(folder / COUNTS, counts)
        if reference is not None:
            reference.write(folder)
        if on_error == "quarantine":
            both = (plan.folder / REJECTS).read_bytes() + rejects.read_bytes()
            write_atomic(context.run_dir / REJECTS, both)
    context.log(f"{num_rows:,} rows with {num_branches:,} branches")
    if verdicts.counts:
        context.log(verdicts.summary())
    timing = {"seconds": seconds, "rows_per_s": num_rows / seconds if seconds else 0.0}
    if num_tokens:
        timing["tokens_per_s"] = num_tokens / seconds
    num_rejected = sum(counts["rejected"].values())
    metrics = {"num_rows": num_rows, "num_branches": num_branches, "num_rejected": num_rejected}
    if num_truncated is not None:
        metrics["num_truncated"] = num_truncated
    return {**metrics, "timing": timing}


def _checked(plan: Plan, chunk: Chunk, record: dict[str, Any], verdicts: Verdicts) -> bytes:
    """The chunk's bytes."""
    try:
        content = rows_path(plan, chunk).read_bytes()
    except FileNotFoundError:
        raise broken(plan, chunk, "has lost its rows") from None
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise broken(plan, chunk, "has other bytes than were written")
    inputs = plan.read_input(chunk)
    ids = [row_id(line) for line in inputs]
    assert ids_sha256(ids) == chunk.ids_sha256
    rejected = {each[ID] for each in record["rejected"]}
    found = [row_id(line) for line in content.splitlines()]
    expected = [row_id for row_id in ids if row_id not in rejected]
    if found != expected:
        raise broken(plan, chunk, _difference(found, expected))
    for each in record["rejected"]:
        line = inputs[each["row"] - 1 - chunk.first_row]
        bad = BadRow(each["reason"], f"{each[ID]}: {each['problem']}")
        place = Place(str(plan.folder / INPUT), each["row"])
        verdicts.reject(place, bad, line.rstrip())
    return content


def _difference(found: list[str], expected: list[str]) -> str:
    """Of two lists that are not equal; expected has each id once."""
    counts = Counter(found)
    for missing in expected:
        if counts[missing] != 1:
            return f"has row {missing} twice" if counts[missing] else f"has lost row {missing}"
    if strange := set(found) - set(expected):
        return f"has a row it was not given, {min(strange)}"
    return "has its rows in another order"


def _added(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in sorted({*one, *other})}
