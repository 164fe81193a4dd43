"""Writing Megatron's indexed datasets, whose layout dataset.py describes.

Both files are written beside their places and renamed when complete: .bin, then .idx.
"""

from array import array
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from post_training.core.errors import PostTrainingError
from post_training.core.files import atomic_file
from post_training.data.indexed.dataset import (
    DTYPES,
    HEADER,
    MAGIC,
    VERSION,
    data_path,
    index_path,
    offsets_of,
)


def best_dtype(vocab_size: int) -> np.dtype:
    """Of ids below `vocab_size`, as Megatron chooses it."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class IndexedWriter:
    """A context manager that writes a pair; on an error neither file is left.

    Tokens go to the file as they come; only lengths are kept.
    """

    def __init__(self, prefix: Path, dtype: np.dtype | type | str):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        known = {np.dtype(name): code for code, name in DTYPES.items()}
        if self.dtype not in known:
            raise PostTrainingError(f"tokens can't be stored as {self.dtype}", where=str(prefix))
        self._code = known[self.dtype]
        self._lengths = array("i")
        self._documents = array("q", [0])

    def __enter__(self) -> "IndexedWriter":
        with ExitStack() as stack:
            # Left in the opposite order: .bin is complete before .idx says so.
            self._new_index = stack.enter_context(atomic_file(index_path(self.prefix)))
            self._new_data = stack.enter_context(atomic_file(data_path(self.prefix)))
            self._data: IO[bytes] = stack.enter_context(open(self._new_data, "wb"))
            self._files = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._files.__exit__(kind, error, trace)
            return
        with self._files:
            self._finish()

    def append(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        sequences_per_document: np.ndarray | None = None,
    ) -> None:
        """Add sequences, whose tokens follow one another in `tokens`, in whole documents.

        sequences_per_document: by default each sequence is a document.
        Errors: PostTrainingError for an id that the dtype can't hold.
        """
        lengths = np.asarray(lengths, np.int64)
        if sequences_per_document is None:
            sequences_per_document = np.ones(len(lengths), np.int64)
        assert 0 <= lengths.min(initial=0) <= lengths.max(initial=0) < 2**31
        assert lengths.sum() == len(tokens)
        assert np.sum(sequences_per_document) == len(lengths)
        limits = np.iinfo(self.dtype)
        if len(tokens) and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
            wrong = tokens.min() if tokens.min() < limits.min else tokens.max()
            raise PostTrainingError(
                f"id {wrong} can't be stored as {self.dtype.name} ({limits.min} to {limits.max})",
                where=str(self.prefix),
            )
        self._data.write(np.ascontiguousarray(tokens, self.dtype))
        first = len(self._lengths)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        ends = first + np.cumsum(sequences_per_document, dtype=np.int64)
        self._documents.frombytes(ends.tobytes())

    def _finish(self) -> None:
        if not self._lengths:
            raise PostTrainingError("no sequence to write", where=str(self.prefix))
        lengths = np.frombuffer(self._lengths, np.int32)
        header = (MAGIC, VERSION, self._code, len(lengths), len(self._documents))
        with open(self._new_index, "wb") as file:
            file.write(HEADER.pack(*header))
            file.write(lengths.astype("<i4"))
            file.write(offsets_of(lengths, self.dtype)[:-1])
            file.write(np.frombuffer(self._documents, np.int64).astype("<i8"))
        # An older index beside the new tokens would open, and cut them at the wrong places.
        index_path(self.prefix).unlink(missing_ok=True)
