"""A stage over chunks, from its configuration to its result."""

from collections.abc import Callable

from post_training.models.reference import Reference
from post_training.stages.annotation.annotator import Annotator
from post_training.stages.annotation.config import ChunkedStageConfig
from post_training.stages.annotation.in_step import do_in_step
from post_training.stages.annotation.merge import merge
from post_training.stages.annotation.plan import make_plan
from post_training.stages.annotation.work import Place, Worker
from post_training.stages.context import Ranks, Result, StageContext
from post_training.stages.leftovers import remove_leftovers
from post_training.stages.references import common_reference


def annotate(
    config: ChunkedStageConfig,
    context: StageContext,
    make_annotator: Callable[[], Annotator],
    *,
    reference: Callable[[], Reference] | None = None,
) -> Result:
    """Do chunks until none is left; a run that is no worker then puts them together.

    make_annotator: called once, and only where there is a chunk to do. reference: whose
    log-probabilities the rows now hold; by default, whose those of the input are.
    Errors: PostTrainingError for rows or chunks that failed; UsageError for another run's chunks.
    """
    folder = config.chunks_dir(context.run_dir)
    # Before the work, as datasets of two references can't become one.
    of_inputs = None if reference else common_reference(config.data.datasets)
    plan = make_plan(folder, config, context)
    context.inputs.release("data.")  # All that is read from here on is the plan's own copy.
    place = _place(config, context.ranks)

    def work(make_annotator: Callable[[], Annotator]) -> int:
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

    def put_together() -> dict:
        remove_leftovers(context.run_dir, "dataset", "rejects.jsonl")
        now = reference() if reference else of_inputs
        return merge(plan, config.data.on_error, now, context)

    metrics = context.on_writer(put_together)
    return Result(artifacts={"dataset": "dataset"}, metrics=metrics)


def _place(config: ChunkedStageConfig, ranks: Ranks) -> Place:
    """Of this process among the workers; ranks in step are one."""
    rank, world_size = (0, 1) if config.is_in_step else (ranks.rank, ranks.world_size)
    return Place(
        number=(config.workers.index or 0) * world_size + rank,
        count=config.workers.count * world_size,
        waits=ranks.is_writer and not config.is_worker,
    )
