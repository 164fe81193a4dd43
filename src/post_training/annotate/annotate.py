"""A stage over chunks, from its configuration to its result: plan, work, merge.

The work of a model with tensor parallelism takes every rank for each of its layers. Then rank 0
does the chunks, and the others compute what it computes (do_in_step).
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

from post_training.annotate.config import ChunkedStageConfig
from post_training.annotate.plan import INPUT, REJECTS, Chunk, Plan, ids_sha256, make_plan
from post_training.annotate.work import (
    Annotator,
    Row,
    Worker,
    WorkerPlace,
    broken_chunk,
    read_chunk_record,
    rows_path,
)
from post_training.core.errors import PostTrainingError
from post_training.core.files import atomic_directory, remove_leftovers, write_atomic, write_json
from post_training.data.branches import ID, row_id
from post_training.data.reading import Verdicts
from post_training.data.rows import BadRow, Place
from post_training.models.reference import Reference, common_reference
from post_training.stages.context import PeerFailed, Ranks, Result, StageContext

ROWS, COUNTS = "rows.jsonl", "counts.json"
MakeAnnotator = Callable[[], Annotator]
# What rank 0 tells the others to do; or the rows of a call of the annotator.
_LOAD, _STOP, _FAIL = "load", "stop", "fail"


def annotate(
    config: ChunkedStageConfig,
    context: StageContext,
    make_annotator: MakeAnnotator,
    *,
    reference: Callable[[], Reference] | None = None,
) -> Result:
    """Do chunks until none is left; a run that is no worker then puts them together.

    make_annotator: called once, and only where there is a chunk to do.
    reference: whose log-probabilities the rows now hold; by default, whose those of the input are.
    Errors: PostTrainingError for rows or chunks that failed; UsageError for another run's chunks.
    """
    folder = config.chunks_dir(context.run_dir)
    # Before the work, as datasets of two references can't become one.
    of_inputs = None if reference else common_reference(config.data.datasets)
    plan = make_plan(folder, config, context)
    context.inputs.release("data.")  # All that is read from here on is the plan's own copy.
    place = _worker_place(config, context.ranks)

    def work(make_annotator: MakeAnnotator) -> int:
        worker = Worker(
            plan,
            place,
            make_annotator,
            config.data.on_error,
            config.max_failed_chunks,
            config.max_failed_rows,
            context,
        )
        worker.run()
        return worker.num_done

    num_done = (
        do_in_step(work, make_annotator, context) if config.is_in_step else work(make_annotator)
    )
    if config.is_worker:
        context.log(f"did {num_done} of {len(plan.chunks)} chunks")
        return Result(artifacts={}, metrics={"timing": {"num_chunks": num_done}})

    def merge() -> dict[str, Any]:
        remove_leftovers(context.run_dir, "dataset", REJECTS)
        now = reference() if reference else of_inputs
        return merge_chunks(plan, config.data.on_error, now, context)

    metrics = context.on_writer(merge)
    return Result(artifacts={"dataset": "dataset"}, metrics=metrics)


def _worker_place(config: ChunkedStageConfig, ranks: Ranks) -> WorkerPlace:
    """The place of this process among the workers; ranks in step are one worker."""
    rank, world_size = (0, 1) if config.is_in_step else (ranks.rank, ranks.world_size)
    return WorkerPlace(
        number=(config.workers.index or 0) * world_size + rank,
        count=config.workers.count * world_size,
        waits=ranks.is_writer and not config.is_worker,
    )


def do_in_step(
    work: Callable[[MakeAnnotator], int], make_annotator: MakeAnnotator, context: StageContext
) -> int:
    """`work` on rank 0, with an annotator that calls those of all ranks; 0 on the others."""

    def make() -> Annotator:
        _broadcast(context, _LOAD)
        return _Leader(make_annotator(), context)

    if not context.ranks.is_writer:
        _follow(make_annotator, context)
        return 0
    try:
        done = work(make)
    # Whatever it was, the others must not wait for ever. A signal is no Exception: it ends the
    # others too, wherever they are.
    except Exception:
        _broadcast(context, _FAIL)
        raise
    _broadcast(context, _STOP)
    return done


def _follow(make_annotator: MakeAnnotator, context: StageContext) -> None:
    """Do what rank 0 says, until it has done its chunks. Errors: PeerFailed where it failed."""
    annotator: Annotator | None = None
    while (told := _broadcast(context, None)) != _STOP:
        if told == _FAIL:
            raise PeerFailed("rank 0 failed, and says why")
        if told == _LOAD:
            annotator = make_annotator()
            continue
        assert annotator is not None
        try:
            annotator(told)
        except Exception:
            # It befell rank 0 as well, which finds the row that it is the fault of.
            annotator.recover()


class _Leader(Annotator):
    """Rank 0's annotator: it has the other ranks call theirs with the same rows."""

    def __init__(self, annotator: Annotator, context: StageContext):
        self._annotator = annotator
        self._context = context

    def __call__(self, rows: list[Row]) -> list[Any]:
        _broadcast(self._context, rows)
        found = self._annotator(rows)
        self.num_tokens = self._annotator.num_tokens
        self.num_truncated = self._annotator.num_truncated
        return found

    def recover(self) -> None:
        self._annotator.recover()


def _broadcast(context: StageContext, what: Any) -> Any:
    """Rank 0's `what`, on every rank."""
    import torch.distributed as dist

    said = [what]
    dist.broadcast_object_list(said, src=0, group=context.ranks.group)
    return said[0]


def merge_chunks(
    plan: Plan, on_error: str, reference: Reference | None, context: StageContext
) -> dict[str, Any]:
    """Write RUN/dataset, and RUN/rejects.jsonl under on_error: quarantine; the run's metrics.

    Each chunk is checked first: it must be of this plan (key), have the bytes that were written
    (sha256), and hold each of its input's rows once and in order, but for those it says were
    rejected. So a row that was lost, doubled or moved is found, whoever did it.

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
                file.write(_read_checked(plan, chunk, record, verdicts))
                num_rows += record["num_rows"]
                num_branches += record["num_branches"]
                num_tokens += record["timing"]["num_tokens"]
                if "num_truncated" in record:  # not of chunks that older versions wrote
                    num_truncated = (num_truncated or 0) + record["num_truncated"]
                seconds += record["timing"]["seconds"]
        if not num_rows:
            raise PostTrainingError(f"no row is left: {verdicts.summary()}", where=str(plan.folder))
        counts: dict[str, Any] = {"num_rows": num_rows, "num_branches": num_branches}
        counts |= {"rejected": _sum_counts(plan.rejected, verdicts.counts)}
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


def _read_checked(plan: Plan, chunk: Chunk, record: dict[str, Any], verdicts: Verdicts) -> bytes:
    """The chunk's bytes; what it rejected goes to `verdicts`. Errors: as merge_chunks."""
    try:
        content = rows_path(plan, chunk).read_bytes()
    except FileNotFoundError:
        raise broken_chunk(plan, chunk, "has lost its rows") from None
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise broken_chunk(plan, chunk, "has other bytes than were written")
    inputs = plan.read_input(chunk)
    ids = [row_id(line) for line in inputs]
    assert ids_sha256(ids) == chunk.ids_sha256
    rejected = {each[ID] for each in record["rejected"]}
    found = [row_id(line) for line in content.splitlines()]
    expected = [each for each in ids if each not in rejected]
    if found != expected:
        raise broken_chunk(plan, chunk, _difference(found, expected))
    for each in record["rejected"]:
        line = inputs[each["row"] - 1 - chunk.first_row]
        bad = BadRow(each["reason"], f"{each[ID]}: {each['problem']}")
        place = Place(str(plan.folder / INPUT), each["row"])
        verdicts.reject(place, bad, line.rstrip())
    return content


def _difference(found: list[str], expected: list[str]) -> str:
    """How two lists of row ids differ that are not equal; `expected` has each id once."""
    counts = Counter(found)
    for missing in expected:
        if counts[missing] != 1:
            return f"has row {missing} twice" if counts[missing] else f"has lost row {missing}"
    if strange := set(found) - set(expected):
        return f"has a row it was not given, {min(strange)}"
    return "has its rows in another order"


def _sum_counts(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in sorted({*one, *other})}
