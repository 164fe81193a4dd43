"""Datasets of the hub, as `post-training data fetch` left them in `data.hub_dir`.

    HUB_DIR/<owner>--<name>/<commit>/<subset or default>/<split>/{rows.parquet,fetched.json}

A run never touches the network: what is not there is refused with the command that fetches it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import read_json
from post_training.core.hashing import sha256_file
from post_training.core.known_digests import Identity, file_identity
from post_training.data.config import DatasetConfig
from post_training.data.sources import Chunk, Source

ROWS = "rows.parquet"
RECORD = "fetched.json"
RECORD_SCHEMA = "post-training/fetched-dataset/1"


def fetched_dir(hub_dir: Path, hub: str, commit: str, subset: str | None, split: str) -> Path:
    return hub_dir / hub.replace("/", "--") / commit / (subset or "default") / split


def open_fetched(dataset: DatasetConfig, hub_dir: Path | None) -> Source:
    """Errors: UsageError with what to set or to run; PostTrainingError when the file there is not
    what was fetched."""
    assert dataset.hub is not None
    if dataset.split is None:
        hint = "set split: train, or the one that is meant"
        raise UsageError("split: missing", where=f"hub: {dataset.hub}", hint=hint)
    if dataset.revision is None:
        problem = "revision: missing, and a branch may change"
        hint = f"set the commit that this prints: {_command(dataset, hub_dir)}"
        raise UsageError(problem, where=f"hub: {dataset.hub}", hint=hint)
    if hub_dir is None:
        hint = "set data.hub_dir to the folder that `post-training data fetch` fills"
        raise UsageError("data.hub_dir: missing", where=f"hub: {dataset.hub}", hint=hint)
    folder = fetched_dir(hub_dir, dataset.hub, dataset.revision, dataset.subset, dataset.split)
    if not (folder / RECORD).is_file():
        problem = f"not fetched: no {folder / RECORD}"
        hint = f"where there is a network, run: {_command(dataset, hub_dir)}"
        raise UsageError(problem, where=f"hub: {dataset.hub}", hint=hint)
    record = read_json(folder / RECORD, RECORD_SCHEMA)
    name = dataset.name or f"{dataset.hub}, {dataset.split}"
    identity = file_identity((folder / ROWS).stat())
    command = _command(dataset, hub_dir)
    source = FetchedSource(folder / ROWS, name, identity, record["sha256"], command)
    source.check()
    return source


@dataclass(frozen=True)
class FetchedSource:
    """Rows whose bytes are those of the record before they are read, and still are afterwards.

    identity: of the file, from before its first check. command: that fetches it again."""

    path: Path
    name: str
    identity: Identity
    sha256: str
    command: str

    def chunks(self) -> Iterator[Chunk]:
        from post_training.data.sources.arrow import ParquetSource

        yield from ParquetSource(self.path, self.name).chunks()
        if file_identity(self.path.stat()) != self.identity:
            self.check()

    def check(self) -> None:
        """Errors: PostTrainingError."""
        if sha256_file(self.path) != self.sha256:
            problem = f"its bytes are not those of {RECORD}"
            hint = f"remove the folder and run: {self.command}"
            raise PostTrainingError(problem, where=str(self.path), hint=hint)


def _command(dataset: DatasetConfig, hub_dir: Path | None) -> str:
    options = {
        "revision": dataset.revision,
        "subset": dataset.subset,
        "split": dataset.split,
        "hub-dir": hub_dir or "HUB_DIR",
    }
    words = [f"--{name} {value}" for name, value in options.items() if value is not None]
    return " ".join(["post-training data fetch", str(dataset.hub), *words])
