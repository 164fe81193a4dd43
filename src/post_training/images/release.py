"""`post-training image release`: test an image, then write it into containers/images.lock.

The tests are those of the image's own commit, run inside the image on the code that is in it. An
image that could not be built again is refused: one of a changed checkout, or of an unlocked base.

containers/images.lock holds the released images and is committed with their recipes. It says which
digests a version has, where there is no image store: on a site that gets the file by copy, and when
an EDF is checked. A released version never becomes another image.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import read_json, write_atomic, write_json
from post_training.images.checkout import worktree
from post_training.images.render import edf_text, image_environment
from post_training.images.store import ImageStore

# pytest's arguments.
TESTS = ("tests/stack", "-m", "stack and not long")
_SCHEMA = "post-training/images-lock/1"
_FROM_RECORD = (
    "name",
    "version",
    "platform",
    "input_hash",
    "oci_digest",
    "sqsh_sha256",
    "sif_sha256",
    "base_sha256",
    "lock_sha256",
)


def release(
    record: Mapping[str, Any], store: ImageStore, repository: Path, tests: Sequence[str]
) -> dict[str, Any]:
    """Test the image and write its entry into images.lock; the entry.

    tests: pytest's arguments, in a checkout of the image's commit.
    Errors: UsageError when the image can't be released; PostTrainingError when a test fails.
    """
    _check_can_be_built_again(record)
    check_version_is_free(repository, record)
    for status, path, _, found in store.verify(dict(record)):
        if status != "ok":
            raise PostTrainingError(f"the image is {status} (sha256 {found})", where=str(path))
    with tempfile.TemporaryDirectory(prefix="post-training-") as temporary:
        folder = Path(temporary)
        with worktree(repository, record["checkout"]["commit"], folder / "checkout") as sources:
            edf = folder / "release.toml"
            write_atomic(edf, _test_edf(record, store, folder, sources))
            _run_inside(
                edf, ["python", "-m", "post_training.images.selfcheck"], "the self-check failed"
            )
            report = folder / "report.xml"
            _run_inside(
                edf,
                ["python", "-m", "pytest", "-p", "no:cacheprovider", "-q",
                 f"--junit-xml={report}", *tests],
                "its tests failed",
            )  # fmt: skip
            tested = f"selfcheck; pytest {' '.join(tests)}: {_summary(report)}"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = release_entry(record, tested, now)
    add_release(repository, entry)
    return entry


def read_releases(repository: Path) -> list[dict[str, Any]]:
    """The entries of images.lock, oldest first; none where there is no lock."""
    try:
        return read_json(images_lock(repository), _SCHEMA)["images"]
    except FileNotFoundError:
        return []


def images_lock(repository: Path) -> Path:
    return repository / "containers/images.lock"


def release_entry(record: Mapping[str, Any], tested: str, released: str) -> dict[str, Any]:
    """An image's entry in images.lock. tested: what was run in it. released: when."""
    identity = {key: record.get(key) for key in _FROM_RECORD}
    if record.get("registries"):
        identity["registries"] = record["registries"]
    return {
        **identity,
        "commit": record["checkout"]["commit"],
        "tested": tested,
        "released": released,
    }


def check_version_is_free(repository: Path, record: Mapping[str, Any]) -> None:
    """Errors: UsageError when this name and version was released as another image."""
    for entry in read_releases(repository):
        same_version = all(entry[key] == record[key] for key in ("name", "version", "platform"))
        if same_version and entry["oci_digest"] != record["oci_digest"]:
            raise UsageError(
                f"{entry['name']} {entry['version']} is released as {entry['oci_digest']}",
                where=str(images_lock(repository)),
                hint="raise the version in pyproject.toml and src/post_training/__init__.py",
            )


def add_release(repository: Path, entry: dict[str, Any]) -> None:
    """Append the entry to images.lock; it replaces an earlier one of the same image."""
    kept = [
        other
        for other in read_releases(repository)
        if (other["name"], other["oci_digest"]) != (entry["name"], entry["oci_digest"])
    ]
    write_json(images_lock(repository), {"schema": _SCHEMA, "images": [*kept, entry]})


def _check_can_be_built_again(record: Mapping[str, Any]) -> None:
    faults = {
        "it was not built from a git checkout": record["checkout"] is None,
        "it was built from a checkout with changes": (record["checkout"] or {}).get("dirty"),
        "its base is not the one that base.lock names": record.get("base") != "locked",
    }
    for fault, is_so in faults.items():
        if is_so:
            raise UsageError(
                f"{record['name']} {record['oci_digest'][:19]} cannot be released: {fault}",
                hint="build and push it again from a clean checkout, with `make lock` if Debian "
                "has moved on",
            )


def _test_edf(record: Mapping[str, Any], store: ImageStore, folder: Path, sources: Path) -> str:
    image = store.image_path(record["sqsh_sha256"])
    return edf_text(
        {
            "image": str(image),
            "workdir": str(sources),
            "entrypoint": False,
            "writable": False,
            "mounts": [f"{store.folder}:{store.folder}:ro", f"{folder}:{folder}"],
        },
        {"env": image_environment(record, image)},
    )


def _run_inside(edf: Path, command: Sequence[str], failure: str) -> None:
    runner = [sys.executable, "-m", "post_training.cli", "edf", "run", str(edf), "--"]
    done = subprocess.run([*runner, *command], stdin=subprocess.DEVNULL, stdout=sys.stderr)
    if done.returncode != 0:
        raise PostTrainingError(f"{failure} in the image; it is not released")


def _summary(report: Path) -> str:
    """`512 passed, 3 skipped` of pytest's report. Errors: PostTrainingError when none passed."""
    counts = ElementTree.parse(report).getroot().find("testsuite").attrib
    num_skipped = int(counts["skipped"])
    num_passed = int(counts["tests"]) - num_skipped
    if num_passed == 0:
        raise PostTrainingError("every test was skipped; it is not released")
    return f"{num_passed} passed, {num_skipped} skipped"
