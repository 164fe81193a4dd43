"""What a stage does to rows: the one thing that it brings itself."""

from abc import ABC, abstractmethod
from typing import Any

from post_training.data.rows import BadRow

Row = dict[str, Any]


class Annotator(ABC):
    """Made once in a process, and only if there is a chunk to do.

    What becomes of a row must not depend on the other rows of the call: chunks are cut otherwise
    in another run, and halved to find a row that fails.
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
