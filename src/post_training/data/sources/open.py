"""From a dataset's settings to its source."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import refuse_special_file
from post_training.data.config import DatasetConfig
from post_training.data.rows import BadRow
from post_training.data.sources import Source
from post_training.data.sources.json_rows import JsonFileSource, JsonlSource

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")


def open_source(dataset: DatasetConfig, hub_dir: Path | None) -> Source:
    """Errors: UsageError when it is not there, or not of a known kind; nothing is parsed yet."""
    if dataset.hub is not None:
        from post_training.data.sources.hub import open_fetched

        return open_fetched(dataset, hub_dir)
    assert dataset.path is not None
    return open_path(dataset.path, dataset.split, dataset.name)


def open_path(path: Path, split: str | None = None, name: str | None = None) -> Source:
    """The source of a file or saved folder. Errors: as of `open_source`."""
    name = name or str(path)
    if not path.exists():
        raise UsageError("no such file or folder", where=str(path))
    refuse_special_file(path)
    if path.is_dir():
        from post_training.data.sources.arrow import open_saved

        return open_saved(path, split, name)
    if split is not None:
        problem = f"a file has no split {split!r}"
        raise UsageError(problem, where=str(path), hint="leave split out")
    check_kind(path)
    match path.suffix:
        case ".jsonl" | ".ndjson":
            return JsonlSource(path, name)
        case ".json":
            return JsonFileSource(path, name)
    from post_training.data.sources.arrow import ParquetSource

    return ParquetSource(path, name)


def check_kind(path: Path) -> None:
    """Errors: UsageError for a file of rows that is not of a known kind."""
    if path.suffix not in SUFFIXES:
        known = f"{', '.join(SUFFIXES)}, or a folder that `datasets` saved"
        raise UsageError(f"unknown kind of file {path.suffix!r}; known: {known}", where=str(path))


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Every object of a file, in order. Errors: PostTrainingError at the first bad row."""
    for chunk in open_path(path).chunks():
        for record in chunk.records():
            if isinstance(record.value, BadRow):
                raise PostTrainingError(record.value.problem, where=str(record.place))
            yield record.value
