"""containers/NAME/base.lock of a recipe whose base is an image in a registry.

The tag of recipe.toml is looked up once, by `image lock`, and pinned by the digest of the manifest
for the recipe's platform. A digest is the sha256 of the manifest's bytes, so what was read is
proved by hashing it. What could not be read stays `unresolved`, with the reason, and is not built.
"""

import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import tomllib
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import atomic_directory, atomic_file, read_json, write_json
from post_training.core.hashing import sha256_file
from post_training.core.process import run_tool, run_tool_bytes
from post_training.images.builder import run_in

UNRESOLVED = "unresolved"
_SCHEMA = "post-training/registry-base-lock/1"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)


def lock_registry_base(path: Path, image: str, platform: str, source: str | None) -> str | None:
    """Resolve `image` and write its lock; None, or why it stays unresolved.

    source: where to read it instead of its registry, as skopeo names places: a mirror
    (`docker://MIRROR/NAME:TAG`) or a local OCI folder (`oci:/FOLDER:TAG`).
    A base that was resolved before keeps its digest when it can't be read now.
    """
    source = source or f"docker://{image}"
    try:
        found: dict[str, Any] = _resolve(source, platform)
        reason = None
    except (PostTrainingError, OSError) as error:
        reason = str(error)
        kept = _read(path) if path.exists() else {}
        if (kept.get("image"), kept.get("platform")) == (image, platform) and _is_digest(kept):
            return f"{reason}\nthe digest of an earlier time is kept"
        # In the file without this machine's addresses and places.
        found = {"digest": UNRESOLVED, "reason": f"skopeo could not read {image}"}
    write_json(path, {"schema": _SCHEMA, "image": image, "platform": platform, **found})
    return reason


def read_registry_base(path: Path, image: str, platform: str) -> str:
    """`NAME@sha256:…`, which a build starts from.

    Errors: UsageError when the lock is missing, unresolved, or of another base.
    """
    hint = f"`post-training image lock {path.parent.name}` where its registry can be reached"
    if not path.exists():
        raise UsageError("the base is not locked", where=str(path), hint=hint)
    lock = _read(path)
    for key, wanted in {"image": image, "platform": platform}.items():
        if lock.get(key) != wanted:
            problem = f"{key} is {lock.get(key)}, recipe.toml asks for {wanted}"
            raise UsageError(problem, where=str(path), hint=hint)
    if not _is_digest(lock):
        problem = f"the base has no digest: {lock.get('reason', lock.get('digest'))}"
        raise UsageError(problem, where=str(path), hint=hint)
    return f"{_name_of(image)}@{lock['digest']}"


def _resolve(source: str, platform: str) -> dict[str, Any]:
    manifest, digest = _manifest(source)
    found: dict[str, Any] = {}
    if manifest.get("mediaType") in _INDEX_TYPES or "manifests" in manifest:
        found["index_digest"] = digest
        system, architecture = platform.split("/")
        digests = [
            entry["digest"]
            for entry in manifest["manifests"]
            if entry.get("platform", {}).get("os") == system
            and entry.get("platform", {}).get("architecture") == architecture
        ]
        if len(digests) != 1:
            raise PostTrainingError(f"{len(digests)} images for {platform} in it", where=source)
        # Read too, and hashed: an index may name what its registry no longer has.
        manifest, digest = _manifest(source, expected=digests[0])
    if not _DIGEST.fullmatch(manifest.get("config", {}).get("digest", "")):
        raise PostTrainingError("not an image: its manifest names no config", where=source)
    return {"digest": digest, "config_digest": manifest["config"]["digest"], **found}


def _manifest(source: str, expected: str | None = None) -> tuple[dict[str, Any], str]:
    """The manifest at `source`, or the one of digest `expected` beside it, and its digest."""
    if expected and source.startswith("oci:"):
        # skopeo cannot name a digest in a folder; a blob's file is named by it.
        folder = source.split(":")[1]
        data = (Path(folder) / "blobs" / expected.replace(":", "/")).read_bytes()
    else:
        place = f"docker://{_name_of(source[9:])}@{expected}" if expected else source
        # A digest is of the very bytes: nothing is decoded before it is taken.
        # By itself it waits for ever for a registry that says nothing.
        data = run_tool_bytes(["skopeo", "--command-timeout=2m", "inspect", "--raw", place])
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if expected and digest != expected:
        raise PostTrainingError(f"its bytes hash to {digest}, not {expected}", where=source)
    try:
        return json.loads(data), digest
    except ValueError:
        raise PostTrainingError("skopeo printed no manifest", where=source) from None


def _name_of(image: str) -> str:
    """Without the tag; a colon before the last slash is a port."""
    folder, slash, last = image.rpartition("/")
    return folder + slash + re.split("[:@]", last)[0]


def _is_digest(lock: dict[str, Any]) -> bool:
    return bool(_DIGEST.fullmatch(lock.get("digest", "")))


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, _SCHEMA)


# uv asks the index that pip is configured for: one place to set it, for locks and for builds.
#
# pip config list  ->  UV_DEFAULT_INDEX, UV_FIND_LINKS, SSL_CERT_FILE, --no-index


_TIMEOUT_S = 60.0
_SETTING = re.compile(r"\S+\.(index-url|find-links|no-index|cert)='(.*)'")
# pip's name: (uv's, how uv separates several).
_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", " "),
}


def run_uv(arguments: Sequence[str | Path], **keywords) -> str:
    """`uv pip compile ARGUMENTS` with pip's index settings; its stdout."""
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else (shutil.which("uv") or "uv")
    return run_tool(
        # pip trusts what the system trusts; so does uv, if it is told to.
        [uv, "pip", "compile", "--quiet", "--system-certs", *_no_index(), *arguments],
        env={**os.environ, **index_settings()},
        hint="`make setup` installs uv" if uv == "uv" else None,
        **keywords,
    )


def download_sources(lock: Path, folder: Path) -> None:
    """Fetch the source archives that `lock` names into `folder`, each checked by its hash.

    Not by pip: it runs every archive's setup.py for its metadata, and some import torch there.
    """
    resolved = run_uv(["--no-deps", "--no-binary", ":all:", "--format", "pylock.toml", lock])
    allowed = set(re.findall(r"sha256:([0-9a-f]{64})", lock.read_text()))
    for package in tomllib.loads(resolved)["packages"]:
        archive = package.get("sdist") or package["archive"]
        address = archive.get("url") or Path(archive["path"]).absolute().as_uri()
        # A local version's `+` is `%2B` in an address.
        download(address, folder / Path(unquote(urlsplit(address).path)).name, allowed)


def download(
    address: str, target: Path, allowed: set[str], *, timeout_s: float = _TIMEOUT_S
) -> None:
    """allowed: the sha256 it may have. timeout_s: how long the other side may say nothing.

    Errors: PostTrainingError when it cannot be had, or is another.
    """
    with atomic_file(target) as temporary:
        try:
            with (
                urllib.request.urlopen(address, timeout=timeout_s) as answer,
                temporary.open("wb") as file,
            ):
                shutil.copyfileobj(answer, file)
        except (http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise PostTrainingError(f"cannot be downloaded: {reason}", where=address) from None
        if (found := sha256_file(temporary)) not in allowed:
            raise PostTrainingError(f"sha256 is {found}, which is not locked", where=address)


def index_settings() -> Mapping[str, str]:
    """pip's settings as variables of uv."""
    return {
        variable: separator.join(text.split())
        for name, (variable, separator) in _VARIABLES.items()
        if (text := _pip_settings().get(name))
    }


def _no_index() -> list[str]:
    # uv has no variable for it.
    return ["--no-index"] if _pip_settings().get("no-index") in ("1", "true", "yes", "on") else []


def _pip_settings() -> dict[str, str]:
    listed = run_tool([sys.executable, "-m", "pip", "config", "list"])
    # Sorted, so that a variable (`:env:`) is read first; the first one counts, as for pip.
    settings: dict[str, str] = {}
    for name, text in _SETTING.findall(listed):
        settings.setdefault(name, text.replace("\\n", " "))
    return settings


# containers/NAME/system.in and system.lock: what a registry base lacks of its distribution.
#
# apt in the base itself says which files an installation would take, from where, and which sha256
# the signed index gives them. By that they are fetched before the build, and installed in it
# without a network. What is signed is for apt to say, by the base's own keys and sources: an index
# that is unsigned, signed by another key, past its time or not to be had is an error. A
# distribution's mirror keeps only the newest versions: one that has gone is said, and the lock must
# be made again.


ASKED, LOCKED = "system.in", "system.lock"
_PACKAGES_SCHEMA = "post-training/system-lock/1"
_FILE = re.compile(r"'(\S+)' (\S+\.deb) \d+ ?(\S*)")
# By itself apt prints MD5, goes on when an index cannot be had, and may be told by the base's own
# settings to take unsigned ones.
_OPTIONS = (
    "-qq -o Acquire::ForceHash=SHA256 -o APT::Update::Error-Mode=any "
    "-o Acquire::AllowInsecureRepositories=false -o Acquire::AllowWeakRepositories=false "
    "-o Acquire::AllowDowngradeToInsecureRepositories=false"
)


def lock_system_packages(folder: Path, base: str, platform: str, working: Path) -> None:
    """Ask apt in `base` and write system.lock. working: where the packages are fetched to.

    Errors: PostTrainingError where the base cannot be pulled, run, or reach its mirror.
    """
    names = package_names(folder / ASKED)
    install = f"apt-get {_OPTIONS} install --no-install-recommends --print-uris {' '.join(names)}"
    files = parse_files(run_in(base, platform, f"apt-get {_OPTIONS} update >&2 && {install}"))
    for file in files:
        # Not kept: a lock names only what its mirror has.
        download(file["address"], working / file["file"], {file["sha256"]})
    write_json(
        folder / LOCKED, {"schema": _PACKAGES_SCHEMA, "base": base, "asked": names, "files": files}
    )


def leave_unresolved(folder: Path, reason: str) -> None:
    """A lock that says why there is none; one that was made before is kept."""
    if not (folder / LOCKED).exists():
        lock = {
            "schema": _PACKAGES_SCHEMA,
            "base": UNRESOLVED,
            "asked": package_names(folder / ASKED),
        }
        write_json(folder / LOCKED, {**lock, "reason": reason, "files": []})


def read_system_lock(folder: Path, base: str) -> list[dict[str, str]]:
    """The locked files. Errors: UsageError for a lock that is missing, unresolved or of another
    base or list."""
    path = folder / LOCKED
    hint = f"`post-training image lock {folder.name}` where its base can be pulled and run"
    try:
        lock: dict[str, Any] = read_json(path, _PACKAGES_SCHEMA)
    except FileNotFoundError:
        raise UsageError("no such lock", where=str(path), hint=hint) from None
    if lock["base"] == UNRESOLVED:
        raise UsageError(f"{UNRESOLVED}: {lock['reason']}", where=str(path), hint=hint)
    for key, wanted in {"base": base, "asked": package_names(folder / ASKED)}.items():
        if lock[key] != wanted:
            problem = f"made for {key} {lock[key]}, wanted is {wanted}"
            raise UsageError(problem, where=str(path), hint=hint)
    return lock["files"]


def ensure_system_packages(files: list[dict[str, str]], lock: Path, store_folder: Path) -> Path:
    """A folder with exactly the locked files, each checked by its hash. It is named for the lock's
    own sha256, by which the records of images name it."""
    folder = store_folder / "system" / sha256_file(lock)
    if not folder.exists():
        with atomic_directory(folder) as temporary:
            for file in files:
                try:
                    download(file["address"], temporary / file["file"], {file["sha256"]})
                except PostTrainingError as error:
                    hint = "its mirror has moved on: `post-training image lock` makes a new lock"
                    raise PostTrainingError(error.problem, where=error.where, hint=hint) from None
    return folder


def parse_files(said: str) -> list[dict[str, str]]:
    """[{"file", "address", "sha256"}] from `apt-get install --print-uris`, sorted by file.

    Errors: PostTrainingError for a file whose index has no sha256.
    """
    found = []
    for address, name, said_hash in _FILE.findall(said):
        kind, _, digest = said_hash.partition(":")
        if kind != "SHA256" or not re.fullmatch("[0-9a-f]{64}", digest):
            raise PostTrainingError(
                f"apt's index has no sha256 of it (got {said_hash!r})", where=name
            )
        found.append({"file": unquote(name), "address": address, "sha256": digest})
    return sorted(found, key=lambda file: file["file"])


def package_names(path: Path) -> list[str]:
    """The names in a list of packages, sorted; `#` begins a comment."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return sorted(line for line in lines if line)
