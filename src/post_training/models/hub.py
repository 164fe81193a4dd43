"""Models of the Hugging Face hub: fetched once, to where runs look for them.

    HUB_DIR/models--<owner>--<name>/<commit>/{the model's files, artifact.json}

A run never touches the network: `model.hub` and `model.revision` of a configuration name this
folder (config.py). Its artifact.json says the repository, the commit and the sha256 of each file,
so that a file which was changed since is noticed by every run that reads it.

Weights are safetensors alone: reading a pickle runs what it holds. Code is not fetched, and a model
that needs its own is refused before its weights are downloaded.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from post_training.core.errors import PostTrainingError, UsageError, tell
from post_training.core.files import atomic_directory, new_file_mode
from post_training.core.hashing import ARTIFACT_RECORD, sha256_file
from post_training.data.sources.hub import hub_faults, resolve_commit
from post_training.models.config import fetched_model_dir
from post_training.records.artifact import read_artifact, seal_fetched

_WEIGHTS = "*.safetensors"
_WANTED = (_WEIGHTS, "*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*", "NOTICE*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5")
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class FetchedModel:
    """A model that lies in `folder` now. commit: to be written into the configuration."""

    folder: Path
    hub: str
    commit: str
    hub_dir: Path

    def settings(self) -> str:
        """The lines that name it in a configuration."""
        lines = [f"hub: {self.hub}", f"revision: {self.commit}", f"hub_dir: {self.hub_dir}"]
        return "\n  ".join(["model:", *lines])


def fetch_model(
    hub: str, revision: str | None, hub_dir: Path, cache: Path | None = None
) -> FetchedModel:
    """Put a model where runs look for it, unless it is there already.

    revision: a branch, a tag or a commit; None: the main branch.
    cache: an HF_HOME, or its folder `hub`: the files are taken from there, and nothing is asked
    for over the network. On the same file system they become links, which need no room.
    Errors: UsageError for a model, a revision or a folder that is not there, for weights that are
    pickles, and for one that needs code of its own; PostTrainingError for a failed download.
    """
    _check_name(hub)
    if cache is None:
        commit = resolve_commit(hub, revision, "model")
    else:
        snapshots = _find_snapshots(hub, cache)
        commit = _find_commit(snapshots, revision)
    folder = fetched_model_dir(hub_dir, hub, commit)
    if (folder / ARTIFACT_RECORD).is_file():
        read_artifact(folder)
        return FetchedModel(folder, hub, commit, hub_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_directory(folder) as temporary:
            if cache is None:
                _download(hub, commit, temporary)
            else:
                _link(snapshots / "snapshots" / commit, hub, temporary)
            seal_fetched(temporary, "model", {"hub": hub, "revision": commit})
    except OSError:
        if not (folder / ARTIFACT_RECORD).is_file():  # else another fetch was faster
            raise
    finally:
        with suppress(OSError):  # what failed leaves no empty folder
            folder.parent.rmdir()
    return FetchedModel(folder, hub, commit, hub_dir)


def _check_name(hub: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
        raise UsageError(
            f"must be OWNER/NAME (got {hub!r})",
            where="hub",
            hint="the name as on the hub; a folder on disk is model.path, and needs no fetching",
        )


def _choose(names: Iterable[str], hub: str) -> list[str]:
    """The files to take: those of the top folder that a model is made of. What stays out is told,
    but for git's own files.

    names: of files, and of folders with a slash at the end.
    Errors: UsageError where there are no weights, or pickles alone.
    """
    names = sorted(names)
    top = [name for name in names if not name.endswith("/")]
    weights = [name for name in top if fnmatch(name, _WEIGHTS)]
    pickles = [name for name in top if any(fnmatch(name, pattern) for pattern in _PICKLES)]
    where = f"hub: {hub}"
    if not weights and pickles:
        raise UsageError(
            f"its weights are pickles alone ({pickles[0]}), and reading one runs what it holds",
            where=where,
            hint="look for a revision with safetensors (often refs/pr/N, by the hub's own "
            "converter: --revision refs/pr/N)",
        )
    if not weights:
        problem = "no model: it has no *.safetensors"
        raise UsageError(problem, where=where, hint=f"its files: {', '.join(top[:8]) or 'none'}")
    if "config.json" not in top:
        raise UsageError("no model for transformers: it has no config.json", where=where)
    wanted = [name for name in top if any(fnmatch(name, pattern) for pattern in _WANTED)]
    if left := [name for name in names if name not in wanted and not name.startswith(".git")]:
        tell(f"not fetched: {', '.join(left)}")
    return wanted


def _check_code(folder: Path, hub: str) -> None:
    """Errors: UsageError for a model whose settings name a class of its own."""
    for path in sorted(folder.glob("*.json")):
        with suppress(ValueError):
            settings = json.loads(path.read_bytes())
            if isinstance(settings, dict) and "auto_map" in settings:
                raise UsageError(
                    f"it needs code of its own, and none is ever run: {path.name} has an auto_map",
                    where=f"hub: {hub}",
                    hint="where transformers has the architecture itself, look for a repository "
                    "without auto_map (often ORG/NAME-hf)",
                )


def _download(hub: str, commit: str, folder: Path) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    with hub_faults(hub, "model"):
        tree = list(HfApi().list_repo_tree(hub, revision=commit, recursive=False))
    files = {each.path: each for each in tree if isinstance(each, RepoFile)}
    folders = [f"{each.path}/" for each in tree if not isinstance(each, RepoFile)]
    names = _choose([*files, *folders], hub)
    # The small files first: what is refused by its settings has not cost its weights.
    weights = [name for name in names if fnmatch(name, _WEIGHTS)]
    for part in ([name for name in names if name not in weights], weights):
        with hub_faults(hub, "model"):
            snapshot_download(hub, revision=commit, local_dir=folder, allow_patterns=part)
        _check_code(folder, hub)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes
    for name in names:
        if not (folder / name).is_file():
            raise PostTrainingError(f"{name} did not come", where=f"hub: {hub}")
        told = files[name].lfs
        if told is not None and sha256_file(folder / name) != told.sha256:
            problem = f"{name}: its sha256 is not the one that the hub tells"
            raise PostTrainingError(problem, where=f"hub: {hub}", hint="fetch it again")


def _find_snapshots(hub: str, cache: Path) -> Path:
    name = f"models--{hub.replace('/', '--')}"
    for folder in (cache / "hub" / name, cache / name):
        if (folder / "snapshots").is_dir():
            return folder
    raise UsageError(
        f"{hub} is not in this cache: no {name}/snapshots below it or its folder hub",
        where=str(cache),
        hint="give the folder that HF_HOME named when it was downloaded",
    )


def _find_commit(snapshots: Path, revision: str | None) -> str:
    """Of a branch or tag as the cache knows it. Errors: UsageError with those that are there."""
    there = sorted(path.name for path in (snapshots / "snapshots").iterdir())
    name = revision or "main"
    reference = snapshots / "refs" / name
    commit = reference.read_text().strip() if reference.is_file() else name
    if _COMMIT.fullmatch(commit) and commit in there:
        return commit
    raise UsageError(
        f"no revision {name} in this cache",
        where=str(snapshots),
        hint=f"it has: {', '.join(there)}" if there else None,
    )


def _link(snapshot: Path, hub: str, folder: Path) -> None:
    """The files of a cache's snapshot, which are links there, as files of `folder`."""
    names = [f"{path.name}/" if path.is_dir() else path.name for path in snapshot.iterdir()]
    mode = new_file_mode(folder)
    for name in _choose(names, hub):
        blob = (snapshot / name).resolve()
        if not blob.is_file():
            raise UsageError(
                f"{name} is not whole in this cache: it leads to {blob}, which is not there",
                where=str(snapshot),
                hint="fetch it without --from-folder",
            )
        # The name of a large file's blob is its sha256, by the hub's own client.
        if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256_file(blob) != blob.name:
            problem = f"{name}: its bytes are not those of its name in the cache"
            raise PostTrainingError(problem, where=str(blob), hint="fetch it again")
        _link_or_copy(blob, folder / name, mode)
    _check_code(folder, hub)


def _link_or_copy(blob: Path, target: Path, mode: int) -> None:
    """mode: that all files of the folder get (core/files.py), and with a link the cache's file too.
    So what is another's, or would be opened to others by it, is copied."""
    status = blob.stat()
    if status.st_uid == os.geteuid() and not mode & ~status.st_mode:
        try:
            os.link(blob, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(blob, target)
