"""Which rows of the sources cleaning leaves out, found before they are read for use.

    sources -> signatures (workers) -> near duplicates   } -> Cleaning, which every Reader asks
    benchmark files -> BenchmarkIndex                    }

Near duplicates need all rows, so `deduplicate: near` reads the sources twice. The result depends on
the rows and their order, not on the number of workers.
"""

import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt32

from post_training.core.errors import shown
from post_training.data.cleaning.contamination import BenchmarkIndex
from post_training.data.cleaning.near_duplicates import (
    NUM_MINIMA,
    find_near_duplicates,
    signature,
)
from post_training.data.cleaning.words import texts_of, words_of
from post_training.data.formats.columns import ColumnReport, Format
from post_training.data.reading import Reader, Rejected, read_chunks
from post_training.data.rows import BadRow, Place
from post_training.data.sources import Chunk, Source


@dataclass(frozen=True)
class Cleaning:
    """What to leave out. duplicates: of each dataset, {(path, number): what it is like}.
    benchmarks: None where nothing is to be compared with."""

    duplicates: tuple[dict[tuple[str, int], str], ...]
    benchmarks: BenchmarkIndex | None

    def check(
        self, place: Place, values: Iterable[dict[str, Any]], dataset: int, found: Format
    ) -> None:
        """Errors: BadRow for a row that is to be left out."""
        if like := self.duplicates[dataset].get((place.path, place.number)):
            raise BadRow("near-duplicate", f"nearly the same as {like}")
        if self.benchmarks is None:
            return
        for value in values:
            if shared := self.benchmarks.find(texts_of(value, found)):
                problem = f"says {self.benchmarks.size} words of {shared.file}:{shared.row}: "
                raise BadRow("contaminated", problem + shown(shared.words, limit=200))


def with_cleaning(
    reader: Reader, sources: Sequence[Source], scratch: Path, log: Callable[[str], None]
) -> Reader:
    """The reader with what its settings ask to be left out; as it was where they ask for nothing.

    scratch: a folder for 480 bytes a row, on disk. log: gets what was compared, in a line each.
    Errors: those of the sources; UsageError and PostTrainingError of a benchmark's file.
    """
    config = reader.config
    duplicates: tuple[dict[tuple[str, int], str], ...] = tuple({} for _ in sources)
    benchmarks = None
    if config.deduplicate == "near":
        duplicates = _find_duplicates(reader, sources, scratch)
        number = sum(map(len, duplicates))
        log(f"data: near duplicates of earlier rows: {number:,}")
    if config.decontaminate is not None:
        benchmarks = BenchmarkIndex.read(config.decontaminate.against, config.decontaminate.ngram)
        counts = zip(benchmarks.files, benchmarks.num_rows, benchmarks.num_short, strict=True)
        for name, number, short in counts:
            line = f"data: compared with the {number:,} rows of {name}"
            if short:
                line += f", of which {short:,} can't be found: no text of {benchmarks.size} words"
            log(line)
    if benchmarks is None and config.deduplicate != "near":
        return reader
    return replace(reader, cleaning=Cleaning(duplicates, benchmarks))


@dataclass(frozen=True)
class Signer:
    """What a worker needs to sign the rows of a chunk."""

    reader: Reader


@dataclass(frozen=True)
class SignedChunk:
    """signatures: NUM_MINIMA of each row. places: of each row, its path and number."""

    dataset: int
    signatures: UInt32[np.ndarray, "R minima"]
    places: list[tuple[str, int]]
    rejected: list[Rejected]  # none: bad rows get their verdicts when they are read for use


def sign_chunk(state: Signer, item: tuple[int, Chunk]) -> SignedChunk:
    """The signatures of the good rows of a chunk."""
    dataset, chunk = item
    found = state.reader.formats[dataset]
    signatures, places = [], []
    for record in state.reader.records(chunk, dataset):
        try:
            values = state.reader.values(record, dataset)
        except BadRow:
            continue
        texts = chain.from_iterable(texts_of(value, found) for value in values)
        words = [word for text in texts for word in words_of(text, signs=True)]
        signatures.append(signature(words))
        places.append((record.place.path, record.place.number))
    table = np.array(signatures, "<u4").reshape(-1, NUM_MINIMA)
    return SignedChunk(dataset, table, places, [])


def _find_duplicates(
    reader: Reader, sources: Sequence[Source], scratch: Path
) -> tuple[dict[tuple[str, int], str], ...]:
    config = reader.config
    paths: dict[str, int] = {}
    path, number, of_dataset = array("i"), array("q"), array("i")
    num_rows = [0] * len(sources)
    report = ColumnReport(reader.formats)
    duplicates: tuple[dict[tuple[str, int], str], ...] = tuple({} for _ in sources)
    with tempfile.TemporaryFile(dir=scratch) as file:  # without a name: a killed job leaves none
        for chunk in read_chunks(
            sign_chunk, Signer(reader), sources, config, num_rows.__getitem__, report
        ):
            file.write(chunk.signatures.tobytes())
            for own, row in chunk.places:
                path.append(paths.setdefault(own, len(paths)))
                number.append(row)
                of_dataset.append(chunk.dataset)
            num_rows[chunk.dataset] += len(chunk.places)
        file.flush()
        if not len(number):  # What is wrong with the rows is told when they are read for use.
            return duplicates
        names = list(paths)
        for found in find_near_duplicates(file, config.near_similarity):
            like = f"{names[path[found.match]]}:{number[found.match]}"
            like += f" (similarity {found.similarity:.2f})"
            if found.kept != found.match:
                like += f", for which {names[path[found.kept]]}:{number[found.kept]} stays"
            place = names[path[found.row]], number[found.row]
            duplicates[of_dataset[found.row]][place] = like
    return duplicates
