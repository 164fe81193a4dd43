"""One model on all ranks: rank 0 does the chunks, and the others compute what it computes.

A model with tensor parallelism takes every rank for each of its layers.
"""

from collections.abc import Callable
from typing import Any

from post_training.stages.annotation.annotator import Annotator, Row
from post_training.stages.context import PeerFailed, StageContext

_LOAD, _STOP, _FAIL = "load", "stop", "fail"
MakeAnnotator = Callable[[], Annotator]


def do_in_step(
    work: Callable[[MakeAnnotator], int], make_annotator: MakeAnnotator, context: StageContext
) -> int:
    """`work` on rank 0, with an annotator that calls those of all ranks; 0 on the others."""

    def make() -> Annotator:
        _tell(context, _LOAD)
        return _Leader(make_annotator(), context)

    if not context.ranks.is_writer:
        _follow(make_annotator, context)
        return 0
    try:
        done = work(make)
    # Whatever it was, the others must not wait for ever. A signal is no Exception: it ends the
    # others too, wherever they are.
    except Exception:
        _tell(context, _FAIL)
        raise
    _tell(context, _STOP)
    return done


def _follow(make_annotator: MakeAnnotator, context: StageContext) -> None:
    annotator: Annotator | None = None
    while (told := _tell(context, None)) != _STOP:
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
    def __init__(self, annotator: Annotator, context: StageContext):
        self._annotator = annotator
        self._context = context

    def __call__(self, rows: list[Row]) -> list[Any]:
        _tell(self._context, rows)
        found = self._annotator(rows)
        self.num_tokens = self._annotator.num_tokens
        self.num_truncated = self._annotator.num_truncated
        return found

    def recover(self) -> None:
        self._annotator.recover()


def _tell(context: StageContext, what: Any) -> Any:
    """What rank 0 says, on every rank."""
    import torch.distributed as dist

    said = [what]
    dist.broadcast_object_list(said, src=0, group=context.group)
    return said[0]
