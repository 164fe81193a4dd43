"""Run a command in the squashfs of an EDF: `post-training edf run FILE -- COMMAND`.

The image is mounted under a temporary overlay, the EDF's mounts over it, and the command replaces
this process. It keeps the pid, so signals, exit codes and Slurm's accounting work as without a
container. (Process 1 of a container stays, and hands signals on.) Works as root and as an ordinary
user, on any Linux with overlayfs and user namespaces.

    /tmp (a tmpfs)   image/   the squashfs, read-only
                     upper/   what is written; gone with the container
                     root/    the overlay of both, which becomes /
    /.old-root       the host's root while mounts are made; then detached

Before anything starts, the image's sha256 is compared with the one that the EDF pins. The file is
opened once, so what is mounted is what was hashed. The result is left for the entrypoint in
/run/post-training/image.json. Nothing is written to the host.
"""

import grp
import json
import os
import pwd
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from post_training.core.errors import PostTrainingError, UsageError, tell
from post_training.images import namespaces as linux
from post_training.images.edf import Edf, Mount, read_image_variables
from post_training.images.identity import (
    PIN,
    check_identity,
    check_unchanged,
    expect_digest,
    image_state,
    open_image,
    open_image_digest,
    read_image,
    read_record_beside,
)
from post_training.images.inside import FINDINGS, host_variables, is_over_files, without_lost_places
from post_training.images.reference import is_reference, parse_reference

PINNED_DIGEST = f"{PIN}SQSH_SHA256"
# A folder that every machine has; what is mounted there is seen in our namespace only.
_STAGE = Path("/tmp")
_OLD_ROOT = Path("/.old-root")
_PACKED = Path("/.packed")
_HOST_FILES = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf")
_MOUNT_FLAGS = {"nosuid": linux.MS_NOSUID, "nodev": linux.MS_NODEV, "noexec": linux.MS_NOEXEC}


def run(
    edf: Edf,
    command: Sequence[str],
    host_env: Mapping[str, str],
    findings: Mapping[str, Any] | None = None,
) -> NoReturn:
    """Replace this process by `command`, inside the EDF's image.

    host_env: the variables to go on from. findings: further {name: JSON value} to leave in
    /run/post-training, as a development mount's.
    Errors: PostTrainingError, while nothing was started yet.
    """
    image = image_file(edf)
    findings = dict(findings or {})
    linux.leave_pid_1()
    # Opened and resolved now: the tmpfs will hide the host's /tmp, and the new root its paths.
    image_descriptor = open_image(image)
    state = image_state(image_descriptor)
    pinned, record = edf.env.get(PINNED_DIGEST), None
    if pinned:
        digest = expect_digest(open_image_digest(image_descriptor, image), pinned, image)
        findings["image"] = {"path": str(image), **digest._asdict()}
        record = read_record_beside(image, pinned)
    findings["mounts"] = [str(wanted) for wanted in edf.mounts]
    uid, gid = os.geteuid(), os.getegid()
    account = _account_lines(uid, gid)
    packed = [
        (open_image(wanted.source) if "sqsh" in wanted.flags else None) for wanted in edf.mounts
    ]
    sources = [os.path.realpath(wanted.source).lstrip("/") for wanted in edf.mounts]
    host_files = {name: os.path.realpath(name).lstrip("/") for name in _HOST_FILES}

    linux.enter_mount_namespace()
    linux.mount("tmpfs", _STAGE, "tmpfs", data="mode=0755")
    root = _prepare_root(image_descriptor, image)
    check_unchanged(image_descriptor, state, image)
    if pinned and edf.env.get(f"{PIN}INPUT_HASH"):
        is_bound = check_identity(edf.env, read_image(_STAGE / "image"), record)
        findings["image"] |= {
            "oci_digest": edf.env[f"{PIN}OCI_DIGEST"] if is_bound else None,
            "checkout": record and record.get("checkout"),
            "registries": record and record.get("registries"),
        }
    for index, descriptor in enumerate(packed):
        if descriptor is not None:
            linux.mount_squashfs(descriptor, edf.mounts[index].source, root / f".packed/{index}")
    (root / ".old-root").mkdir()
    linux.pivot_root(root, root / ".old-root")
    os.chdir("/")
    linux.detach(_OLD_ROOT / "tmp")  # Our tmpfs, which hid the host's /tmp.

    _mount_system(host_files)
    _add_account(account)
    FINDINGS.mkdir(parents=True, exist_ok=True)
    # A command before the stage, such as `sh -c "pip install …"`, may change a writable image.
    findings["mounted_over"] = ["/"] if edf.writable and command[:1] != ["entrypoint"] else []
    own = [FINDINGS / f"{name}.json" for name in findings]
    findings["mounted_over"] += _mount_all(edf, sources, packed, own)
    for name, value in findings.items():
        (FINDINGS / f"{name}.json").write_text(json.dumps(value))
    environment = _environment(host_env, edf)
    if _is_emulated() and os.uname().machine == "x86_64":
        environment = {**linux.EMULATED_ARM64, **environment}
    words = [*_image_entrypoint(edf), *command]
    linux.detach(_OLD_ROOT)
    _OLD_ROOT.rmdir()
    if not edf.writable:
        linux.mount("", "/", flags=linux.MS_REMOUNT | linux.MS_RDONLY)
    _enter_workdir(edf)
    if uid != 0:
        linux.become_user(uid, gid)
    _execute(words, environment)


def image_file(edf: Edf) -> Path:
    """The EDF's image as a file on this machine; one in a registry as the store has it.

    Errors: UsageError for an image in a registry that is not in the store.
    """
    if is_reference(edf.image) and not Path(edf.image).exists():
        return _stored(edf)
    if "#" in edf.image or not (edf.image.endswith(".sqsh") or Path(edf.image).exists()):
        raise UsageError(
            f"image: must be a squashfs file here (got {edf.image!r})",
            where=str(edf.path),
            hint="a registry image is run by the site's own engine; `make push-sqsh` makes a file",
        )
    return Path(edf.image).absolute()


def _stored(edf: Edf) -> Path:
    """The squashfs of an image that the EDF names in a registry."""
    from post_training.images.store import open_store

    wanted, store = parse_reference(edf.image), open_store(None)
    for record in store.records():
        if wanted.digest in (record.get("registries") or {}).values():
            return store.image_path(record["sqsh_sha256"])
    raise UsageError(
        f"image: {wanted} is not in the image store",
        where=str(edf.path),
        hint=f"`post-training image pull {wanted}`",
    )


def _prepare_root(image_descriptor: int, image: Path) -> Path:
    """Mount the image and the overlay, on which mount points and /run can be made; the overlay."""
    for name in ("image", "upper", "work", "root"):
        (_STAGE / name).mkdir()
    linux.mount_squashfs(image_descriptor, image, _STAGE / "image")
    options = f"lowerdir={_STAGE}/image,upperdir={_STAGE}/upper,workdir={_STAGE}/work"
    linux.mount("overlay", _STAGE / "root", "overlay", data=options)
    return _STAGE / "root"


def _mount_system(host_files: Mapping[str, str]) -> None:
    """Mount what every program expects: /proc, /sys, /dev, a /tmp of its own, and host names."""
    for name in ("proc", "sys", "dev"):
        Path("/", name).mkdir(exist_ok=True)
        linux.bind(_OLD_ROOT / name, f"/{name}")
    if _is_emulated() and linux.HOST_CPUS.exists():
        linux.mount("tmpfs", linux.HOST_CPUS, "tmpfs", data="mode=755")
    Path("/tmp").mkdir(exist_ok=True)
    linux.mount("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=1777")
    for name, file in host_files.items():
        if (_OLD_ROOT / file).is_file():
            _make_mount_point(Path(name), is_folder=False)
            linux.bind(_OLD_ROOT / file, name, read_only=True)
    if not Path("/etc/hosts").exists():
        Path("/etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")


def _is_emulated() -> bool:
    shell = Path("/bin/sh")
    return shell.is_file() and linux.is_emulated(shell)


def _mount_all(
    edf: Edf, sources: Sequence[str], packed: Sequence[int | None], own: Sequence[Path]
) -> list[str]:
    """Make the EDF's mounts, in their order; where one hides files of the image.

    sources: for each mount, its path below the host's root. packed: for each mount, the descriptor
    of its squashfs, which is mounted below /.packed already, or None. own: the runner's files.
    """
    over_files = []
    places = [Path("/proc"), Path("/sys"), Path("/dev")]
    for index, wanted in enumerate(edf.mounts):
        place = Path(os.path.realpath(wanted.target))
        _check_place(place, wanted, edf, own)
        if is_over_files(place, places):
            over_files.append(str(place))
        if packed[index] is None:
            _mount_into(_OLD_ROOT / sources[index], wanted, places)
        else:
            _mount_into(_PACKED / str(index), wanted, places)
            linux.detach(_PACKED / str(index))
            (_PACKED / str(index)).rmdir()
        places.append(place)
    if _PACKED.exists():
        _PACKED.rmdir()
    return over_files


def _check_place(place: Path, wanted: Mount, edf: Edf, own: Sequence[Path]) -> None:
    """Errors: UsageError for a mount that would hide the runner's files or put them on the host.

    own: these files.
    """
    if FINDINGS.is_relative_to(place) or place in own:
        raise UsageError(
            f"mounts: {FINDINGS} is the runner's own (got {wanted})",
            where=str(edf.path),
            hint=f"mount folders below {place} one by one" if place in FINDINGS.parents else None,
        )


def _mount_into(source: Path, wanted: Mount, places: Sequence[Path]) -> None:
    """Bind `source` to the mount's target, with its flags.

    places: where something is mounted already.
    Errors: UsageError where the mount point would have to be made on the host.
    """
    target = Path(os.path.realpath(wanted.target))
    if not target.exists() and (over := [p for p in places if target.is_relative_to(p)]):
        # Making it would write through that mount, to the host.
        raise UsageError(
            f"mounts: {wanted.target} does not exist in what is mounted at {over[-1]}",
            hint="make it on the host first, or mount it elsewhere",
        )
    _make_mount_point(wanted.target, is_folder=source.is_dir())
    flags = 0
    for name in wanted.flags & _MOUNT_FLAGS.keys():
        flags |= _MOUNT_FLAGS[name]
    linux.bind(source, wanted.target, read_only="ro" in wanted.flags, flags=flags)
    for name, flag in linux.PROPAGATION.items():
        if name in wanted.flags:
            linux.mount("", wanted.target, flags=flag)
        elif f"r{name}" in wanted.flags:
            linux.mount("", wanted.target, flags=flag | linux.MS_REC)


def _make_mount_point(target: Path, *, is_folder: bool) -> None:
    # Links in the image (/var/run -> /run) are followed: we stand in the image's own root.
    try:
        if is_folder:
            target.mkdir(parents=True, exist_ok=True)
        elif not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
    except OSError as error:
        raise PostTrainingError(
            f"cannot make the mount point: {(error.strerror or '').lower()}", where=str(target)
        ) from None


def _account_lines(uid: int, gid: int) -> dict[str, str]:
    """{file: this user's line} for /etc/passwd and /etc/group; the host may have it from LDAP."""
    lines = {}
    try:
        lines["/etc/passwd"] = ":".join(str(field) for field in pwd.getpwuid(uid))
    except KeyError:
        lines["/etc/passwd"] = f"user:x:{uid}:{gid}::/:/bin/sh"
    try:
        lines["/etc/group"] = f"{grp.getgrgid(gid).gr_name}:x:{gid}:"
    except KeyError:
        lines["/etc/group"] = f"group{gid}:x:{gid}:"
    return lines


def _add_account(lines: Mapping[str, str]) -> None:
    """Add the lines where the image has none: libraries look up the user's name and need one."""
    for name, line in lines.items():
        path = Path(name)
        present = path.read_text() if path.exists() else ""
        number = line.split(":")[2]
        if not any(entry.split(":")[2:3] == [number] for entry in present.splitlines()):
            path.write_text(f"{present.rstrip()}\n{line}\n".lstrip())


def _environment(host_env: Mapping[str, str], edf: Edf) -> dict[str, str]:
    """The command's variables: the EDF's, over the image's, over the host's.

    An empty one in the EDF is unset.
    """
    image = read_image_variables()
    host, dropped = host_variables(host_env)
    if dropped and host_env.get("SLURM_PROCID", "0") == "0":
        tell(
            f"warning: variables of the shell that do not reach the image: {', '.join(dropped)}"
            " (an EDF's [env] can set them)"
        )
    own = {**image, **edf.env}
    merged = without_lost_places({**host, **own}, own)
    return {name: value for name, value in merged.items() if value or name not in edf.env}


def _image_entrypoint(edf: Edf) -> list[str]:
    """/etc/rc, which enroot writes into images that it imports; it ends in `exec "$@"`."""
    if not edf.entrypoint:
        return []
    if not Path("/etc/rc").exists():
        raise UsageError("entrypoint: the image has none (no /etc/rc in it)", where=str(edf.path))
    return ["/bin/sh", "/etc/rc"]


def _enter_workdir(edf: Edf) -> None:
    try:
        os.chdir(edf.workdir or "/")
    except OSError as error:
        raise UsageError(
            f"workdir: {(error.strerror or '').lower()} inside the image (got {edf.workdir!r})",
            where=str(edf.path),
            hint="mount it, or choose a folder that the image has",
        ) from None


def _execute(words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    # execvpe searches this process's PATH, not that of the environment it is given.
    os.environ["PATH"] = environment.get("PATH", os.defpath)
    # Python ignores these, and an exec keeps that: `zcat file | head` would end in an error.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvpe(words[0], words, dict(environment))
    except OSError as error:
        failed = PostTrainingError(
            f"cannot run it: {(error.strerror or '').lower()}", where=words[0]
        )
        # As a shell reports it.
        failed.exit_code = 127 if isinstance(error, FileNotFoundError) else 126
        raise failed from None
