"""Datasets of the hub: read from `data.hub_dir`, where `post-training data fetch` has put them.

    HUB_DIR/<owner>--<name>/<commit>/<subset or default>/<split>/{rows.parquet,fetched.json}

A run never touches the network: what is not there is refused with the command that fetches it.

`fetch` gets one split of a hub dataset, at one commit. The repository's files are downloaded by the
hub's own client, read by `datasets`, and written as one parquet file with a record beside it.
Everything happens in a folder that is removed in the end; what stays is complete.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import atomic_directory, read_json, write_json
from post_training.core.hashing import Identity, file_identity, sha256_file
from post_training.data.config import DatasetConfig
from post_training.data.sources import Chunk, Source
from post_training.records.licences import licence_in_card

ROWS = "rows.parquet"
RECORD = "fetched.json"
RECORD_SCHEMA = "post-training/fetched-dataset/1"


def fetched_dir(hub_dir: Path, hub: str, commit: str, subset: str | None, split: str) -> Path:
    """Where a split of a hub dataset lies."""
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


@dataclass(frozen=True)
class Fetched:
    """A split that lies in `hub_dir` now. commit: to be written into the configuration. licence: as
    its card states it; None where it states none, and for what earlier versions fetched."""

    folder: Path
    hub: str
    commit: str
    subset: str | None
    split: str
    num_rows: int
    licence: str | None = None

    def settings(self) -> str:
        """The lines that name it in `data.datasets`."""
        lines = [f"- hub: {self.hub}", f"  revision: {self.commit}"]
        lines += [f"  subset: {self.subset}"] if self.subset else []
        return "\n".join([*lines, f"  split: {self.split}"])


def fetch(hub: str, revision: str | None, subset: str | None, split: str, hub_dir: Path) -> Fetched:
    """Download a split to where runs look for it, unless it is there already.

    revision: a branch, a tag or a commit; None: the main branch.
    Errors: UsageError when the hub has no such dataset, revision, subset or split;
    PostTrainingError when it can't be reached, or its files can't be read.
    """
    commit = resolve_commit(hub, revision, "dataset")
    folder = fetched_dir(hub_dir, hub, commit, subset, split)
    if not (folder / RECORD).is_file():
        hub_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".fetch-", dir=hub_dir, ignore_cleanup_errors=True
        ) as work:
            snapshot = _download(hub, commit, Path(work, "snapshot"))
            rows = _load(snapshot, hub, subset, split, Path(work, "cache"))
            facts = {"hub": hub, "commit": commit, "subset": subset, "split": split}
            if (licence := licence_in_card(snapshot)) is not None:
                facts["licence"] = licence
            _write(folder, rows, facts)
    record = read_json(folder / RECORD, RECORD_SCHEMA)
    licence = record.get("licence")
    return Fetched(folder, hub, commit, subset, split, record["num_rows"], licence)


def licences_of_fetched(settings: dict[str, Any]) -> dict[str, str]:
    """{key of a dataset: licence} of the splits that a run reads, where one is known.

    settings: of all roles, by their dotted keys.
    """
    found = {}
    for key, hub in settings.items():
        dataset, _, name = key.rpartition(".")
        split, commit = (settings.get(f"{dataset}.{each}") for each in ("split", "revision"))
        if name != "hub" or not (hub and split and commit and settings.get("data.hub_dir")):
            continue
        hub_dir, subset = Path(settings["data.hub_dir"]), settings.get(f"{dataset}.subset")
        path = fetched_dir(hub_dir, hub, commit, subset, split) / RECORD
        licence = read_json(path, RECORD_SCHEMA).get("licence") if path.is_file() else None
        if licence is not None:
            found[dataset] = licence
    return found


def resolve_commit(hub: str, revision: str | None, kind: Literal["dataset", "model"]) -> str:
    """The commit that a name stands for now; a commit is asked for only when it is downloaded."""
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    with hub_faults(hub, kind):
        commit = HfApi().repo_info(hub, repo_type=kind, revision=revision).sha
    assert commit is not None
    return commit


def _download(hub: str, commit: str, folder: Path) -> Path:
    from huggingface_hub import snapshot_download

    with hub_faults(hub, "dataset"):
        snapshot_download(hub, repo_type="dataset", revision=commit, local_dir=folder)
    # The client's notes about the download would be taken for data files.
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return folder


def _load(snapshot: Path, hub: str, subset: str | None, split: str, cache: Path) -> Any:
    import datasets

    try:
        splits = datasets.load_dataset(str(snapshot), subset, cache_dir=str(cache))
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        problem = " ".join(str(error).replace(str(snapshot), hub).split())
        raise UsageError(f"can't be loaded: {problem}", where=f"hub: {hub}") from None
    if split not in splits:
        problem, hint = f"no split {split!r}", f"splits: {', '.join(splits)}"
        raise UsageError(problem, where=f"hub: {hub}", hint=hint)
    return splits[split]


def _write(folder: Path, rows: Any, facts: dict[str, Any]) -> None:
    record = {"schema": RECORD_SCHEMA, **facts, "num_rows": len(rows)}
    try:
        with atomic_directory(folder) as temporary:
            rows.to_parquet(str(temporary / ROWS))
            write_json(temporary / RECORD, record | {"sha256": sha256_file(temporary / ROWS)})
    except OSError:
        if not (folder / RECORD).is_file():  # else another fetch was faster
            raise


@contextmanager
def hub_faults(hub: str, kind: str) -> Iterator[None]:
    """The hub's errors in our words. kind: of what is asked for, a dataset or a model."""
    import httpx2
    from huggingface_hub import errors

    where = f"hub: {hub}"
    try:
        yield
    except errors.RevisionNotFoundError:
        raise UsageError("the hub has no such revision of it", where=where) from None
    except errors.GatedRepoError:
        hint = "ask for access on its page, and set HF_TOKEN"
        raise UsageError(
            "the hub gives it only to those it knows", where=where, hint=hint
        ) from None
    except errors.RepositoryNotFoundError:
        hint = "check the name; a private one needs HF_TOKEN"
        raise UsageError(f"the hub has no such {kind}", where=where, hint=hint) from None
    except errors.HFValidationError as error:
        raise UsageError(str(error), where=where, hint="it is called OWNER/NAME") from None
    except (errors.HfHubHTTPError, OSError, httpx2.HTTPError) as error:
        problem = " ".join(str(error).split())
        raise PostTrainingError(f"the download failed: {problem}", where=where) from None
