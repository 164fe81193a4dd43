"""A stage over chunks, from its configuration to its result."""

from collections.abc import Callable

from post_training.models.reference import Reference
from post_training.stages.annotation.annotator import Annotator
from post_training.stages.annotation.config import ChunkedStageConfig
from post_training.stages.annotation.merge import merge
from post_training.stages.annotation.plan import make_plan
from post_training.stages.annotation.work import Place, Worker
from post_training.stages.context import Result, StageContext
from post_training.stages.leftovers import remove_leftovers
from post_training.stages.references import common_reference


def annotate(
    config: ChunkedStageConfig,
    context: StageContext,
    make_annotator: Callable[[], Annotator],
    *,
    version: int,
    reference: Callable[[], Reference] | None = None,
) -> Result:
    """Do chunks until none is left; a run that is no worker then puts them together.

    make_annotator: called once, and only where there is a chunk to do. version: of the stage's
    code; chunks of another version are refused, so raise it when the stage's rows change.
    reference: whose log-probabilities the rows now hold; by default, whose those of the input are.
    Errors: PostTrainingError for rows or chunks that failed; UsageError for another run's chunks.
    """
    folder = config.chunks_dir(context.run_dir)
    plan = make_plan(folder, config, version, context)
    ranks, workers = context.ranks, config.workers
    place = Place(
        number=(workers.index or 0) * ranks.world_size + ranks.rank,
        count=workers.count * ranks.world_size,
        waits=ranks.is_writer and not config.is_worker,
    )
    # Before the work, as datasets of two references can't become one.
    of_inputs = None if reference else common_reference(config.data.datasets)
    worker = Worker(
        plan, place, make_annotator, config.data.on_error, config.max_failed_chunks, context
    )
    worker.run()
    if config.is_worker:
        context.log(f"did {worker.num_done} of {len(plan.chunks)} chunks")
        return Result(artifacts={}, metrics={"timing": {"num_chunks": worker.num_done}})

    def put_together() -> dict:
        remove_leftovers(context.run_dir, "dataset", "rejects.jsonl")
        now = reference() if reference else of_inputs
        return merge(plan, config.data.on_error, now, context)

    metrics = context.on_writer(put_together)
    return Result(artifacts={"dataset": "dataset"}, metrics=metrics)
