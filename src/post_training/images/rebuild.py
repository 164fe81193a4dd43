"""Build a recorded image again: `post-training image rebuild`, to see whether its bits are the
same, and `restore`, because it is needed and gone.

The recorded commit is checked out into a temporary folder and builds itself, with its own
`image build` and `image push-sqsh`, in a store and a buildah storage of its own. What it is made of
(base, wheels, a distribution's packages) comes from the real store, by hash.
"""

import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import sha256_file
from post_training.core.process import run_tool
from post_training.images.checkout import worktree
from post_training.images.own_base import ensure_in_builder, read_own_base
from post_training.images.recipe import BASE_LOCK, load_recipe
from post_training.images.store import ImageStore

# That are named where two images differ.
_MOST_PATHS = 10
_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFREG: "file",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
}


def rebuild(
    record: Mapping[str, Any], store: ImageStore, repository: Path, *, cached: bool
) -> list[str]:
    """Build the image of `record` again; a line for everything that differs.

    cached: take the layers that buildah already has; else every layer is built.
    Errors: UsageError when its sources are unknown or lost; PostTrainingError when a build fails.
    """
    with _built_again(record, store, repository, cached=cached) as again:
        return image_differences(record, store, again.records()[0], again)


def restore(image: Mapping[str, Any], store: ImageStore, repository: Path) -> dict[str, Any]:
    """Build an image that is in no store again and add it to this one; its record.

    image: its record, or what a run's record says of it.
    Errors: as of `rebuild`; PostTrainingError when the result is another image.
    """
    with _built_again(image, store, repository, cached=True) as again:
        made = again.records()[0]
        if made["oci_digest"] != image["oci_digest"]:
            raise PostTrainingError(
                "the image that its recipe gives now is another one: "
                + "; ".join(image_differences(image, store, made, again))
            )
        with store.lock():
            for path in again.files(made):
                path.replace(store.folder / path.name)
            store.add(made)
    return made


def image_differences(
    record: Mapping[str, Any], store: ImageStore, other: Mapping[str, Any], again: ImageStore
) -> list[str]:
    """How the image of `record` in `store` differs from that of `other` in `again`, a line each.

    First digests, then versions of tools, then the first paths of the root file systems. Empty when
    the digests are equal.
    """
    lines = [
        f"{key} is {record[key]}, then {other.get(key)}"
        for key in ("base_sha256", "input_hash", "oci_digest", "sqsh_sha256", "sif_sha256")
        if key in record and record[key] != other.get(key)
    ]
    if not lines:
        return []
    lines += [
        f"{tool} is {version}, then {other['builder'].get(tool)}"
        for tool, version in record.get("builder", {}).items()
        if version != other["builder"].get(tool)
    ]
    before, after = store.image_path(record["sqsh_sha256"]), again.image_path(other["sqsh_sha256"])
    if not before.exists():
        return [*lines, f"{before} is gone, so no paths can be compared"]
    with mounted_squashfs(before) as first, mounted_squashfs(after) as second:
        paths = list(itertools.islice(differing_paths(first, second), _MOST_PATHS + 1))
    if len(paths) > _MOST_PATHS:
        paths[_MOST_PATHS:] = ["…"]
    return [*lines, *(paths or ["every path is equal"])]


def differing_paths(first: Path, second: Path, below: str = "") -> Iterator[str]:
    """`path: what differs` for every path whose kind, mode, owner, time or content differs, sorted.

    first, second: root folders. below: a folder in both, where to begin.
    """
    ours, theirs = _entries(first / below), _entries(second / below)
    for name in sorted(ours.keys() | theirs.keys()):
        path = f"{below}/{name}" if below else name
        if name not in ours or name not in theirs:
            yield f"{path}: only in the {'first' if name in ours else 'second'}"
            continue
        if what := _difference(first / path, second / path, ours[name], theirs[name]):
            yield f"{path}: {what}"
        if stat.S_ISDIR(ours[name].st_mode) and stat.S_ISDIR(theirs[name].st_mode):
            yield from differing_paths(first, second, path)


def _entries(folder: Path) -> dict[str, os.stat_result]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat(follow_symlinks=False) for entry in entries}


def _difference(
    first: Path, second: Path, ours: os.stat_result, theirs: os.stat_result
) -> str | None:
    our_kind, their_kind = stat.S_IFMT(ours.st_mode), stat.S_IFMT(theirs.st_mode)
    if our_kind != their_kind:
        return f"{_KINDS[our_kind]}, then {_KINDS[their_kind]}"
    for what, one, other in (
        ("mode", stat.filemode(ours.st_mode), stat.filemode(theirs.st_mode)),
        ("owner", f"{ours.st_uid}:{ours.st_gid}", f"{theirs.st_uid}:{theirs.st_gid}"),
        ("time", int(ours.st_mtime), int(theirs.st_mtime)),
    ):
        if one != other:
            return f"{what} is {one}, then {other}"
    if our_kind == stat.S_IFLNK and first.readlink() != second.readlink():
        return f"link to {first.readlink()}, then to {second.readlink()}"
    if our_kind == stat.S_IFREG:
        if ours.st_size != theirs.st_size:
            return f"{ours.st_size} bytes, then {theirs.st_size}"
        if sha256_file(first) != sha256_file(second):
            return "content"
    return None


@contextmanager
def _built_again(
    record: Mapping[str, Any], store: ImageStore, repository: Path, *, cached: bool
) -> Iterator[ImageStore]:
    """A store that holds the image as its recorded commit builds it today."""
    checkout = record["checkout"]
    if checkout is None:
        raise UsageError("the image was not built from a git checkout, so its sources are unknown")
    # In the store: it has room for an image, and its files can be linked there.
    with store.work_folder() as folder:
        with worktree(repository, checkout["commit"], folder / "checkout") as sources:
            if checkout["dirty"]:
                _check_changes_are_elsewhere(record, sources)
            again = ImageStore(folder / "store")
            _share_inputs(store, again, record["name"])
            with _buildah_storage(folder / "buildah", cached=cached) as variables:
                if variables:
                    _lend_base(record["name"], sources, variables)
                verbs = ["build", "push-sqsh", *(["push-sif"] if record.get("sif_sha256") else [])]
                for verb in verbs:
                    _run_own(verb, record["name"], sources, again, variables)
        yield again


def _check_changes_are_elsewhere(record: Mapping[str, Any], sources: Path) -> None:
    """Errors: UsageError when the checkout's changes were in files that go into the image."""
    # A run's record does not name the base, so its input hash can't be computed.
    base = record.get("base_sha256")
    recipe = load_recipe(record["name"], sources)
    is_same = base and recipe.input_hash(base) == record["input_hash"]
    # No hash of files says which of our images is the base.
    if is_same and recipe.settings.is_over_ours:
        locked = (recipe.folder / BASE_LOCK).exists() and read_own_base(recipe)["oci_digest"]
        is_same = locked == f"sha256:{base}"
    if not is_same:
        raise UsageError(
            f"the image was built from changes that commit {record['checkout']['commit'][:12]} "
            "does not have, and which nobody kept",
            hint="build images from clean checkouts; `image show` says `dirty` otherwise",
        )


def _share_inputs(store: ImageStore, again: ImageStore, name: str) -> None:
    """Link what builds are made of from one store into the other.

    All of it is found by its hash, so sharing it can't make two images equal that are not.
    """
    again.folder.mkdir()
    for part in ("bases", f"wheels/{name}", "system"):
        if (store.folder / part).exists():
            # Links: what the build throws away stays in the real store.
            shutil.copytree(store.folder / part, again.folder / part, copy_function=os.link)


def _lend_base(name: str, sources: Path, variables: Mapping[str, str]) -> None:
    """Copy the base into the empty storage, if it is one of our images: it is given, not built."""
    recipe = load_recipe(name, sources)
    if not recipe.settings.is_over_ours:
        return
    tag = ensure_in_builder(read_own_base(recipe), recipe.folder / BASE_LOCK)
    ours = json.loads(run_tool(["buildah", "info"]))["store"]
    place = f"{ours['GraphDriverName']}@{ours['GraphRoot']}+{ours['RunRoot']}"
    run_tool(
        ["skopeo", "copy", "--quiet", f"containers-storage:[{place}]{tag}",
         f"containers-storage:{tag}"],
        env={**os.environ, **variables},
    )  # fmt: skip


@contextmanager
def _buildah_storage(folder: Path, *, cached: bool) -> Iterator[dict[str, str]]:
    """Variables that make buildah use an empty storage; none with `cached`."""
    if cached:
        yield {}
        return
    folder.mkdir()
    settings = folder / "storage.conf"
    settings.write_text(
        f'[storage]\ndriver = "overlay"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/root"\n'
    )
    variables = {"CONTAINERS_STORAGE_CONF": str(settings)}
    try:
        yield variables
    finally:
        run_tool(["buildah", "rmi", "--all", "--force"], env={**os.environ, **variables})


def _run_own(
    verb: str, name: str, sources: Path, store: ImageStore, variables: Mapping[str, str]
) -> None:
    """Run a command of the checked-out commit itself."""
    done = subprocess.run(
        [sys.executable, "-m", "post_training.cli", "image", verb, name,
         "--repository", sources, "--store", store.folder],
        # EDF_PATH: the rendered EDF must not be linked into the user's folder.
        env={**os.environ, **variables, "PYTHONPATH": str(sources / "src"),
             "EDF_PATH": str(sources.parent / "edf")},
        stdin=subprocess.DEVNULL, stdout=sys.stderr,
    )  # fmt: skip
    if done.returncode != 0:
        raise PostTrainingError(f"image {verb} of the recorded commit failed; see above")


@contextmanager
def mounted_squashfs(file: Path, offset_bytes: int = 0) -> Iterator[Path]:
    """Mount a squashfs and yield its root folder. offset_bytes: where in the file it begins.

    Root mounts it by a loop device, an ordinary user by squashfuse.
    """
    with tempfile.TemporaryDirectory(prefix="post-training-") as target:
        if os.geteuid() == 0:
            options = f"loop,ro,offset={offset_bytes}"
            run_tool(["mount", "-t", "squashfs", "-o", options, file, target])
            unmount = ["umount", target]
        else:
            run_tool(["squashfuse", "-o", f"offset={offset_bytes}", file, target])
            unmount = ["fusermount3" if shutil.which("fusermount3") else "fusermount", "-u", target]
        try:
            yield Path(target)
        finally:
            run_tool(unmount)
