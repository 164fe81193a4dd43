"""What benchmarks ask, as hashes of so many words in a row, and where a row says the same.

    benchmark files -> n-grams of every text -> BenchmarkIndex -> the first n-gram that a row shares

Signs and case don't count (GPT-3, arXiv:2005.14165, appendix C: 13 words). A benchmark's text of
fewer words can't be found, and the numbers of such rows are told.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt64

from post_training.core.errors import PostTrainingError
from post_training.data.cleaning.words import all_texts, hash_ngrams, words_of
from post_training.data.rows import BadRow
from post_training.data.sources.open import open_path


@dataclass(frozen=True)
class Contamination:
    """file, row: of the benchmark. words: that both say."""

    file: str
    row: int
    words: str


@dataclass(frozen=True)
class BenchmarkIndex:
    """hashes: ascending, of n-grams of `size` words; file, row: where each
    first stands. num_rows, num_short: of each file, its rows, and those too short to be found."""

    size: int
    files: tuple[str, ...]
    hashes: UInt64[np.ndarray, " N"]
    file: Int32[np.ndarray, " N"]
    row: Int32[np.ndarray, " N"]
    num_rows: tuple[int, ...]
    num_short: tuple[int, ...]

    @classmethod
    def read(cls, paths: Sequence[Path], size: int) -> "BenchmarkIndex":
        """Errors: UsageError for a file that is not there; PostTrainingError for a bad row."""
        found, files, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)], []
        rows.append(files[0])
        num_rows, num_short = [], []
        for index, path in enumerate(paths):
            num_rows.append(0)
            num_short.append(0)
            for chunk in open_path(path).chunks():
                for record in chunk.records():
                    if isinstance(record.value, BadRow):
                        raise PostTrainingError(record.value.problem, where=str(record.place))
                    own = [_hashes(text, size) for text in all_texts(record.value)]
                    hashes = np.concatenate([found[0], *own])
                    found.append(hashes)
                    files.append(np.full(len(hashes), index, np.int32))
                    rows.append(np.full(len(hashes), record.place.number, np.int32))
                    num_rows[-1] += 1
                    num_short[-1] += not len(hashes)
            if not num_rows[-1]:
                raise PostTrainingError("no rows", where=str(path))
        hashes, first = np.unique(np.concatenate(found), return_index=True)
        file, row = np.concatenate(files)[first], np.concatenate(rows)[first]
        names = tuple(path.name for path in paths)
        return cls(size, names, hashes, file, row, tuple(num_rows), tuple(num_short))

    def find(self, texts: Iterable[str]) -> Contamination | None:
        """The first n-gram of the texts that a benchmark has too."""
        for text in texts:
            hashes = _hashes(text, self.size)
            if not len(hashes) or not len(self.hashes):
                continue
            places = np.searchsorted(self.hashes, hashes)
            shared = self.hashes.take(places, mode="clip") == hashes
            if shared.any():
                start = int(shared.argmax())
                place = int(places[start])
                words = words_of(text, signs=False)[start : start + self.size]
                name = self.files[self.file[place]]
                return Contamination(name, int(self.row[place]), " ".join(words))
        return None


def _hashes(text: str, size: int) -> UInt64[np.ndarray, " ngrams"]:
    return hash_ngrams(words_of(text, signs=False), size)
