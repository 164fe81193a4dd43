"""`post-training data fetch`: one split of a hub dataset, at one commit, to where runs look for it.

The repository's files are downloaded by the hub's own client, read by `datasets`, and written as
one parquet file with a record beside it (sources/hub.py). Everything happens in a folder that is
removed in the end; what stays is complete.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import atomic_directory, read_json, write_json
from post_training.core.hashing import sha256_file
from post_training.data.sources.hub import RECORD, RECORD_SCHEMA, ROWS, fetched_dir


@dataclass(frozen=True)
class Fetched:
    """commit: to be written into the configuration."""

    folder: Path
    hub: str
    commit: str
    subset: str | None
    split: str
    num_rows: int

    def settings(self) -> str:
        """The lines that name it in `data.datasets`."""
        lines = [f"- hub: {self.hub}", f"  revision: {self.commit}"]
        lines += [f"  subset: {self.subset}"] if self.subset else []
        return "\n".join([*lines, f"  split: {self.split}"])


def fetch(hub: str, revision: str | None, subset: str | None, split: str, hub_dir: Path) -> Fetched:
    """revision: a branch, a tag or a commit; None: the main branch.

    Errors: UsageError when the hub has no such dataset, revision, subset or split;
    PostTrainingError when it can't be reached, or its files can't be read.
    """
    commit = _resolve(hub, revision)
    folder = fetched_dir(hub_dir, hub, commit, subset, split)
    if not (folder / RECORD).is_file():
        hub_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".fetch-", dir=hub_dir, ignore_cleanup_errors=True
        ) as work:
            snapshot = _download(hub, commit, Path(work, "snapshot"))
            rows = _load(snapshot, hub, subset, split, Path(work, "cache"))
            _write(folder, rows, {"hub": hub, "commit": commit, "subset": subset, "split": split})
    record = read_json(folder / RECORD, RECORD_SCHEMA)
    return Fetched(folder, hub, commit, subset, split, record["num_rows"])


def _resolve(hub: str, revision: str | None) -> str:
    """The commit that a name stands for now; a commit is asked for only when it is downloaded."""
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    with _hub_faults(hub):
        commit = HfApi().dataset_info(hub, revision=revision).sha
    assert commit is not None
    return commit


def _download(hub: str, commit: str, folder: Path) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_faults(hub):
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
def _hub_faults(hub: str) -> Iterator[None]:
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
        raise UsageError("the hub has no such dataset", where=where, hint=hint) from None
    except errors.HFValidationError as error:
        raise UsageError(str(error), where=where, hint="it is called OWNER/NAME") from None
    except (errors.HfHubHTTPError, OSError, httpx2.HTTPError) as error:
        problem = " ".join(str(error).split())
        raise PostTrainingError(f"the download failed: {problem}", where=where) from None
