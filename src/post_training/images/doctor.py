"""`entrypoint doctor`: is this container what a run needs? Asked inside the image, on the node.

The image's identity, package versions, network, credentials and storage are checked here; devices
in stages/doctor.py, which may import torch. Nothing is changed, but for a small file that proves a
folder writable and is removed. No secret is shown.

A check yields findings: ok, note (right or wrong, as the user means it) or wrong, with a hint.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.secrets import CREDENTIALS, check_token_file
from post_training.images.edf_check import HOOK_PROFILE, PROFILE, network_faults
from post_training.images.identity import IMAGE_FILE
from post_training.images.inside import (
    PLACES,
    find_mounts_over_image,
    foreign_variables,
    identify_image,
    read_development_mount,
)
from post_training.images.selfcheck import CONFIGURATION, version_faults

Status = Literal["ok", "note", "wrong"]
_MARKS = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}
# Plugins by which NCCL and RCCL use libfabric.
_PLUGINS = ("libnccl-net*.so*", "librccl-net*.so*")
_FABRIC = "libfabric.so*"
# Where images and hooks put libraries, besides the folders of LD_LIBRARY_PATH.
_LIBRARY_FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/*/lib", "/opt/cray/*/*/lib64")
_LEAST_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """subject: what was checked. hint: what the user can do about it."""

    subject: str
    status: Status
    text: str
    hint: str | None = None


def ok(subject: str, text: str) -> Finding:
    return Finding(subject, "ok", text)


def note(subject: str, text: str, hint: str | None = None) -> Finding:
    return Finding(subject, "note", text, hint)


def wrong(subject: str, text: str, hint: str | None = None) -> Finding:
    return Finding(subject, "wrong", text, hint)


def examine(subject: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What `check` finds; a user's error or a system's becomes a finding too."""
    try:
        return list(check())
    except PostTrainingError as error:
        place = f"{error.where}: " if error.where else ""
        first, *more = error.problem.splitlines()
        # Of a program that failed: its name, and the last line of its output.
        text = f"{first}: {more[-1].strip()}" if more else first
        return [wrong(subject, place + text, error.hint)]
    except OSError as error:
        return [wrong(subject, f"{error.filename}: {(error.strerror or str(error)).lower()}")]


def describe_findings(findings: Iterable[Finding]) -> tuple[int, str]:
    """The exit code, 1 when something is wrong; and the findings for a person, a line each."""
    num_wrong = 0
    lines = []
    for finding in findings:
        num_wrong += finding.status == "wrong"
        lines.append(f"{_MARKS[finding.status]}  {finding.subject:12}  {finding.text}")
        if finding.hint:
            lines.append(f"{'':21}hint: {finding.hint}")
    lines.append(f"{num_wrong} wrong" if num_wrong else "nothing is wrong")
    return (1 if num_wrong else 0), "\n".join(lines)


def examine_image(env: Mapping[str, str]) -> list[Finding]:
    """Every check that needs no torch. env: the process's environment."""
    return [
        *examine("image", lambda: _check_identity(env)),
        *examine("versions", _check_versions),
        *examine("network", lambda: check_network(env, Path("/"))),
        *examine("credentials", lambda: check_credentials(env)),
        *examine("storage", lambda: check_storage(env)),
    ]


def _check_identity(env: Mapping[str, str]) -> Iterator[Finding]:
    image = identify_image(env)
    text = f"{image['name']} {image['version']}, {image['oci_digest']}"
    if image["verified_by"] == "declared":
        yield note(
            "image",
            f"{text}: the EDF's word, since the file cannot be read from here",
            f"mount {Path(image['path']).parent} into the container, read-only",
        )
    else:
        yield ok("image", f"{text}, verified by {image['verified_by']}")
    if development := read_development_mount():
        yield note(
            "image",
            f"the code is of a mounted checkout (commit {development['commit']}): runs are not "
            "reproducible by digest",
        )
    if over := [*find_mounts_over_image(), *foreign_variables(env)]:
        yield note(
            "image",
            f"other code than the image's may run: {', '.join(over)}: runs are not reproducible by "
            "digest",
        )


def _check_versions() -> Iterator[Finding]:
    if not IMAGE_FILE.exists():
        raise UsageError("not inside an image of post-training", where=str(IMAGE_FILE))
    faults = version_faults(CONFIGURATION)
    for fault in faults:
        yield wrong("versions", fault, "packages were added over the image's: build an image")
    if not faults:
        platform = json.loads(IMAGE_FILE.read_text())["platform"]
        yield ok("versions", f"every package is the locked one ({platform})")


def check_network(env: Mapping[str, str], root: Path) -> Iterator[Finding]:
    """The network profile, the plugin for libfabric, and the Slingshot devices.

    root: of the file system to look at, / but in tests.
    """
    profile = env.get(PROFILE)
    if not profile:
        yield wrong("network", f"{PROFILE} is not set", "run it with an EDF that `edf render` made")
        return
    yield ok("network", f"profile {profile} of the site {env.get('POST_TRAINING_SITE')}")
    for fault in network_faults(env):
        yield wrong("network", fault.removeprefix("env."))
    yield from _check_interfaces(env.get("NCCL_SOCKET_IFNAME", ""), root)
    if profile == "none":
        return
    yield from _check_hook(profile, env)
    plugins = _find_libraries(env, root, _PLUGINS)
    if plugins:
        yield ok("network", f"plugin of NCCL or RCCL for libfabric: {plugins[0]}")
    elif env.get("NCCL_NET") == "AWS Libfabric":
        yield wrong(
            "network",
            "NCCL_NET asks for the libfabric plugin, and there is none (libnccl-net.so)",
            "on Alps the aws_ofi_nccl hook brings it: see [annotations]; on LUMI the base has it",
        )
    else:
        yield note("network", "no plugin for libfabric found: several nodes would talk over TCP")
    fabric = _find_libraries(env, root, (_FABRIC,))
    if not fabric:
        yield wrong("network", "no libfabric in the container", "the cxi hook, or a bind, is off")
    if not list((root / "dev").glob("cxi*")):
        yield wrong(
            "network", "no Slingshot device (/dev/cxi*)", "the cxi hook is off, or not on a node"
        )


def _check_hook(profile: str, env: Mapping[str, str]) -> Iterator[Finding]:
    """What the network's settings are; with the profile of the site's hook, they are the hook's."""
    words = [f"{n}={v}" for n, v in sorted(env.items()) if n.startswith(("NCCL_", "FI_"))]
    yield ok("network", f"set: {', '.join(words) or 'nothing of NCCL or libfabric'}")
    # The EDF of this profile sets no variable of libfabric.
    if profile == HOOK_PROFILE and not any(word.startswith("FI_") for word in words):
        yield wrong(
            "network",
            f"the profile {profile} leaves libfabric to the site's hook, which has set nothing",
            "is com.hooks.aws_ofi_nccl.enabled in [annotations]? or take --site clariden-cscs",
        )


def _check_interfaces(names: str, root: Path) -> Iterator[Finding]:
    present = sorted(path.name for path in (root / "sys/class/net").glob("*"))
    for name in filter(None, names.split(",")):
        if not any(interface.startswith(name) for interface in present):
            yield wrong(
                "network",
                f"NCCL_SOCKET_IFNAME names {name}, and there is only {', '.join(present)}",
            )


def _find_libraries(env: Mapping[str, str], root: Path, patterns: tuple[str, ...]) -> list[Path]:
    folders = [Path(word) for word in env.get("LD_LIBRARY_PATH", "").split(":") if word]
    for pattern in _LIBRARY_FOLDERS:
        folders += [Path("/", path.relative_to(root)) for path in root.glob(pattern.lstrip("/"))]
    return [
        Path("/", path.relative_to(root))
        for folder in folders
        for pattern in patterns
        for path in sorted((root / str(folder).lstrip("/")).glob(pattern))
    ]


def check_credentials(env: Mapping[str, str]) -> Iterator[Finding]:
    for credential in CREDENTIALS:
        if env.get(credential.value_variable):
            yield note(
                "credentials",
                f"{credential.value_variable} is set: the secret itself is in the environment of "
                "every process",
                f"unset it; put it into ~/.config/post-training/credentials/{credential.name}",
            )
        path = env.get(credential.path_variable)
        if not path or not Path(path).exists():
            yield ok("credentials", f"{credential.name}: none")
            continue
        check_token_file(Path(path))
        Path(path).read_bytes()  # Its mode does not prove that we can read it.
        yield ok("credentials", f"{credential.name}: {path}, readable by its owner alone")


def check_storage(env: Mapping[str, str]) -> Iterator[Finding]:
    """The folders that a run writes to, and shared memory."""
    folders = {"working folder": Path.cwd(), "temporary": Path(tempfile.gettempdir())}
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        if env.get(name):
            folders[name] = Path(env[name])
    for name, folder in folders.items():
        yield from check_writable(name, folder)
    for name in PLACES:
        if env.get(name) and not Path(env[name]).exists():
            yield note(
                "storage",
                f"{name} names {env[name]}, which is not here",
                f'{name} = "" in the [env] of the EDF unsets it',
            )
    shared = shutil.disk_usage("/dev/shm").total
    if shared < _LEAST_FREE_BYTES:
        yield wrong("storage", f"/dev/shm has {shared >> 20} MiB; data loaders need 1 GiB")


def check_writable(name: str, folder: Path) -> Iterator[Finding]:
    """Write a file and remove it: permissions say nothing of a read-only mount or a quota."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        yield wrong("storage", f"{name}: cannot be written: {folder}: {reason}")
        return
    free = shutil.disk_usage(folder).free
    said = f"{name}: {folder}, {free / (1 << 30):.0f} GiB free"
    if free < _LEAST_FREE_BYTES:
        yield wrong("storage", said, "a checkpoint would not fit")
    else:
        yield ok("storage", said)
