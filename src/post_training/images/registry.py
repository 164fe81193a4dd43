"""What an image takes from servers: a base from a registry, the base's missing packages, wheels.

    recipe.toml's base   ->  base.lock      digest of the manifest in the registry, for the platform
    system.in            ->  system.lock    address and sha256 of each package of the distribution

`image lock` asks once and pins what it got; a build checks it and asks nobody. A digest is the
sha256 of the manifest's bytes, so what was read is proved by hashing it. What could not be read is
`unresolved` in the lock, with the reason, and is not built.

apt in the base itself says which files an installation takes, from where, and the sha256 that the
signed index gives them. It is apt that checks the signatures, with the base's own keys and sources:
an index that is unsigned, signed by another key, out of date or missing is an error. A mirror keeps
only the newest versions: where a locked file is gone, the lock must be made again.

Wheels and source archives come from the index that pip is configured for. uv is given the same
settings, so there is one place to set them, for locks and for builds.
"""

import contextlib
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
from post_training.images.recipe import SYSTEM_LOCK, SYSTEM_PACKAGES

# Where the CPU build of torch is published, for where pip is not told where to look.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
PYPI = "https://pypi.org/simple"
_INDEXES_OF_UV = (
    "UV_DEFAULT_INDEX",
    "UV_INDEX",
    "UV_INDEX_URL",
    "UV_EXTRA_INDEX_URL",
    "UV_FIND_LINKS",
)
UNRESOLVED = "unresolved"
_BASE_LOCK_SCHEMA = "post-training/registry-base-lock/1"
_SYSTEM_LOCK_SCHEMA = "post-training/system-lock/1"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
# A line of `apt-get install --print-uris`: 'ADDRESS' FILE SIZE HASH.
_PRINTED_FILE = re.compile(r"'(\S+)' (\S+\.deb) \d+ ?(\S*)")
# Without these, apt may print MD5, goes on when an index is missing, and may be told by the base's
# own settings to take unsigned ones.
_APT_OPTIONS = (
    "-qq -o Acquire::ForceHash=SHA256 -o APT::Update::Error-Mode=any "
    "-o Acquire::AllowInsecureRepositories=false -o Acquire::AllowWeakRepositories=false "
    "-o Acquire::AllowDowngradeToInsecureRepositories=false"
)
_TIMEOUT_S = 60.0
# A line of `pip config list`.
_SETTING = re.compile(r"\S+\.(index-url|find-links|no-index|cert)='(.*)'")
# pip's setting: (uv's variable, what separates several values in it).
_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", " "),
}


def lock_registry_base(path: Path, image: str, platform: str, source: str | None) -> str | None:
    """Find the digest of `image` and write its lock; None, or why it stays unresolved.

    A base that was resolved before keeps its digest when it can't be read now.
    path: of the lock. image: REGISTRY/NAME:TAG. platform: as linux/arm64.
    source: where to read it instead of its registry, as skopeo names places: a mirror
    (`docker://MIRROR/NAME:TAG`) or a local OCI folder (`oci:/FOLDER:TAG`).
    """
    source = source or f"docker://{image}"
    try:
        found: dict[str, Any] = _resolve(source, platform)
        reason = None
    except (PostTrainingError, OSError) as error:
        reason = str(error)
        kept = read_json(path, _BASE_LOCK_SCHEMA) if path.exists() else {}
        if (kept.get("image"), kept.get("platform")) == (image, platform) and _is_digest(kept):
            return f"{reason}\nthe digest of an earlier time is kept"
        # The lock is committed: this machine's addresses and paths stay out of it.
        found = {"digest": UNRESOLVED, "reason": f"{image} could not be read"}
    write_json(path, {"schema": _BASE_LOCK_SCHEMA, "image": image, "platform": platform, **found})
    return reason


def read_registry_base(path: Path, image: str, platform: str) -> str:
    """The locked base as `NAME@sha256:…`, which a build starts from.

    Errors: UsageError when the lock is missing, unresolved, or of another base or platform.
    """
    hint = f"`post-training image lock {path.parent.name}` where its registry can be reached"
    if not path.exists():
        raise UsageError("the base is not locked", where=str(path), hint=hint)
    lock = read_json(path, _BASE_LOCK_SCHEMA)
    for key, wanted in {"image": image, "platform": platform}.items():
        if lock.get(key) != wanted:
            problem = f"{key} is {lock.get(key)}, recipe.toml asks for {wanted}"
            raise UsageError(problem, where=str(path), hint=hint)
    if not _is_digest(lock):
        problem = f"the base has no digest: {lock.get('reason', lock.get('digest'))}"
        raise UsageError(problem, where=str(path), hint=hint)
    return f"{_name_of(image)}@{lock['digest']}"


def lock_system_packages(folder: Path, base: str, platform: str, working: Path) -> None:
    """Ask apt in `base` for what system.in names, and write system.lock.

    base: NAME@sha256:…. working: a temporary folder, to which the packages are fetched once.
    Errors: PostTrainingError where the base cannot be pulled, run, or reach its mirror.
    """
    names = read_package_names(folder / SYSTEM_PACKAGES)
    install = (
        f"apt-get {_APT_OPTIONS} install --no-install-recommends --print-uris {' '.join(names)}"
    )
    files = parse_printed_files(
        run_in(base, platform, f"apt-get {_APT_OPTIONS} update >&2 && {install}")
    )
    for file in files:
        # Fetched and not kept: a lock names only what its mirror really has.
        download(file["address"], working / file["file"], {file["sha256"]})
    write_json(
        folder / SYSTEM_LOCK,
        {"schema": _SYSTEM_LOCK_SCHEMA, "base": base, "asked": names, "files": files},
    )


def leave_unresolved(folder: Path, reason: str) -> None:
    """Write a system.lock that says why nothing is locked; an earlier lock is kept instead."""
    if not (folder / SYSTEM_LOCK).exists():
        lock = {
            "schema": _SYSTEM_LOCK_SCHEMA,
            "base": UNRESOLVED,
            "asked": read_package_names(folder / SYSTEM_PACKAGES),
        }
        write_json(folder / SYSTEM_LOCK, {**lock, "reason": reason, "files": []})


def read_system_lock(folder: Path, base: str) -> list[dict[str, str]]:
    """The locked files, as [{"file", "address", "sha256"}].

    Errors: UsageError for a lock that is missing, unresolved, or of another base or list.
    """
    path = folder / SYSTEM_LOCK
    hint = f"`post-training image lock {folder.name}` where its base can be pulled and run"
    try:
        lock: dict[str, Any] = read_json(path, _SYSTEM_LOCK_SCHEMA)
    except FileNotFoundError:
        raise UsageError("no such lock", where=str(path), hint=hint) from None
    if lock["base"] == UNRESOLVED:
        raise UsageError(f"{UNRESOLVED}: {lock['reason']}", where=str(path), hint=hint)
    for key, wanted in {
        "base": base,
        "asked": read_package_names(folder / SYSTEM_PACKAGES),
    }.items():
        if lock[key] != wanted:
            problem = f"made for {key} {lock[key]}, wanted is {wanted}"
            raise UsageError(problem, where=str(path), hint=hint)
    return lock["files"]


def ensure_system_packages(files: list[dict[str, str]], lock: Path, store_folder: Path) -> Path:
    """A folder with exactly the locked files, downloaded where it is missing, checked by hash.

    It is named for the sha256 of the lock itself, which the records of images hold.
    """
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


def download_sources(lock: Path, folder: Path) -> None:
    """Fetch the source archives that `lock` names into `folder`, each checked by its hash.

    Not with `pip download`: it runs the archives' setup.py for metadata, and some import torch.
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
    """Fetch a file and check it.

    allowed: every sha256 that it may have. timeout_s: how long the server may be silent.
    Errors: PostTrainingError when it cannot be downloaded, or has another sha256.
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


def run_uv(arguments: Sequence[str | Path], **keywords) -> str:
    """Run `uv pip compile ARGUMENTS` with pip's index settings; its stdout.

    keywords: of `run_tool`.
    """
    uv = _uv()
    return run_tool(
        # The system's certificates, as pip takes them; uv has its own unless told.
        [uv, "pip", "compile", "--quiet", "--system-certs", *_no_index(), *arguments],
        env={**os.environ, **read_index_settings()},
        hint="`make setup` installs uv" if uv == "uv" else None,
        **keywords,
    )


def lock_for_uv(repository: Path) -> None:
    """Write uv.lock. It names files by address, so it is made from PyPI itself: the addresses of
    this machine's index are nobody else's."""
    settings = {**os.environ, **read_index_settings()}
    settings = {name: text for name, text in settings.items() if name not in _INDEXES_OF_UV}
    run_tool(
        [_uv(), "lock", "--quiet", "--no-config", "--system-certs", "--default-index", PYPI],
        cwd=repository,
        env=settings,
    )


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.exists() else (shutil.which("uv") or "uv")


def read_index_settings() -> Mapping[str, str]:
    """pip's index settings as uv's variables: UV_DEFAULT_INDEX, UV_FIND_LINKS, SSL_CERT_FILE."""
    return {
        variable: separator.join(text.split())
        for name, (variable, separator) in _VARIABLES.items()
        if (text := _read_pip_settings().get(name))
    }


def parse_printed_files(output: str) -> list[dict[str, str]]:
    """[{"file", "address", "sha256"}] from what `apt-get install --print-uris` printed, sorted.

    Errors: PostTrainingError for a file whose index has no sha256.
    """
    found = []
    for address, name, printed_hash in _PRINTED_FILE.findall(output):
        kind, _, digest = printed_hash.partition(":")
        if kind != "SHA256" or not re.fullmatch("[0-9a-f]{64}", digest):
            raise PostTrainingError(
                f"apt's index has no sha256 of it (got {printed_hash!r})", where=name
            )
        found.append({"file": unquote(name), "address": address, "sha256": digest})
    return sorted(found, key=lambda file: file["file"])


def read_package_names(path: Path) -> list[str]:
    """The names in a list of packages, one a line, sorted; `#` begins a comment."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return sorted(line for line in lines if line)


def _resolve_by_podman(image: str, platform: str) -> dict[str, Any]:
    """As `_resolve`, where skopeo is missing (Alps). podman has no way to read a manifest's bytes,
    but it pulls by digest, and checks: the image is pulled, which a build needs anyway."""
    name = _name_of(image)
    pulled = run_tool(["podman", "pull", "--quiet", f"--platform={platform}", image])
    [inspected] = json.loads(run_tool(["podman", "image", "inspect", pulled.split()[-1]]))
    config = inspected["Id"].removeprefix("sha256:")
    if (system := f"{inspected['Os']}/{inspected['Architecture']}") != platform:
        raise PostTrainingError(f"podman pulled it for {system}", where=image)
    # Of an index too, and of the same image in other places: whichever the registry has.
    references = [text for text in inspected["RepoDigests"] if text.startswith(f"{name}@")]
    for reference in references:
        with contextlib.suppress(PostTrainingError):
            again = run_tool(["podman", "pull", "--quiet", f"--platform={platform}", reference])
            if again.split()[-1] == inspected["Id"]:
                return {"digest": reference.split("@")[1], "config_digest": f"sha256:{config}"}
    raise PostTrainingError("podman knows no digest by which its registry has it", where=image)


def _resolve(source: str, platform: str) -> dict[str, Any]:
    if shutil.which("skopeo") is None and source.startswith("docker://"):
        if shutil.which("podman") is None:
            raise PostTrainingError("neither skopeo nor podman is installed", where=source)
        return _resolve_by_podman(source.removeprefix("docker://"), platform)
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
        # Read and hashed too: an index may name an image that its registry no longer has.
        manifest, digest = _manifest(source, expected=digests[0])
    if not _DIGEST.fullmatch(manifest.get("config", {}).get("digest", "")):
        raise PostTrainingError("not an image: its manifest names no config", where=source)
    return {"digest": digest, "config_digest": manifest["config"]["digest"], **found}


def _manifest(source: str, expected: str | None = None) -> tuple[dict[str, Any], str]:
    """The manifest at `source`, or the one of digest `expected` beside it, and its digest."""
    if expected and source.startswith("oci:"):
        # skopeo has no name for a digest in a folder; a blob's file is named by its digest.
        folder = source.split(":")[1]
        data = (Path(folder) / "blobs" / expected.replace(":", "/")).read_bytes()
    else:
        place = f"docker://{_name_of(source[9:])}@{expected}" if expected else source
        # The digest is of the very bytes: they are hashed before they are decoded.
        # Without a limit skopeo waits for ever for a registry that does not answer.
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


def _no_index() -> list[str]:
    """pip's no-index as an option: uv has no variable for it."""
    is_set = _read_pip_settings().get("no-index") in ("1", "true", "yes", "on")
    return ["--no-index"] if is_set else []


def _read_pip_settings() -> dict[str, str]:
    listed = run_tool([sys.executable, "-m", "pip", "config", "list"])
    # pip sorts the lines: a variable (`:env:`) comes before a file, and the first one counts.
    settings: dict[str, str] = {}
    for name, text in _SETTING.findall(listed):
        settings.setdefault(name, text.replace("\\n", " "))
    return settings
