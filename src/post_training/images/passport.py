"""`post-training image passport`: is an image the same image in each of its forms?

    form        made by            its digest             read by
    OCI         build              of the config          the builder's mount
    squashfs    push-sqsh          of the file            a loop mount, or squashfuse
    SIF         push-sif           of the file            the squashfs in it
    registry    image push         of the manifest        the config that the manifest names

Compared are the tree of files (kind, mode, owner and content of every path; no times, which the
forms keep differently), the variables that the image sets, and the program `entrypoint`. Each form
is also started, where this machine has what starts it, and asked for the same things from inside.
What cannot be had here is said, and is no difference.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.core.files import write_atomic
from post_training.core.hashing import sha256_file
from post_training.core.process import run_tool
from post_training.images import builder
from post_training.images.edf import parse_environment
from post_training.images.identity import OCI_DIGEST_FILE
from post_training.images.push import mounted_image, sif_partition
from post_training.images.rebuild import mounted_squashfs
from post_training.images.reference import known_references
from post_training.images.render import edf_text, image_environment
from post_training.images.share import read_manifest
from post_training.images.store import ImageStore

SCHEMA = "post-training/image-passport/1"
# What one form alone has: the squashfs holds the digest of the OCI image that it was made of.
_OF_ONE_FORM = {str(OCI_DIGEST_FILE.relative_to("/"))}
_SINGULARITY_ENVIRONMENT = ".singularity.d/env/90-environment.sh"
_EXPORT = re.compile(r'export ([A-Za-z_]\w*)="(.*)"')
_ENTRYPOINT = "entrypoint"
# The place of the program, then every variable.
_ASK = f"command -v {_ENTRYPOINT} || echo none; exec env -0"
_ARCHITECTURES = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}
_EMULATORS = Path("/proc/sys/fs/binfmt_misc")


@dataclass
class Form:
    """What was found of an image's form. None: it could not be had, and `notes` says why.

    tree: sha256, as of `tree_hash`. environment: the variables that the image sets in this form.
    entrypoint: sha256 of the program. started: whether it started, and said the same from inside.
    """

    name: str
    digest: str
    tree: str | None = None
    environment: dict[str, str] | None = None
    entrypoint: str | None = None
    started: bool | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Passport:
    """differences: a line for each; none: it is one image."""

    image: dict[str, str]
    forms: list[Form]
    differences: list[str]

    def as_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2)


def make_passport(record: Mapping[str, Any], store: ImageStore) -> Passport:
    """Read, start and compare every form of a stored image. record: the store's."""
    forms = [_oci(record, store), _squashfs(record, store)]
    if record.get("sif_sha256"):
        forms.append(_sif(record, store, forms[1]))
    else:
        made = f"`post-training image push-sif {record['name']}` makes one"
        forms.append(Form("SIF", "none", notes=[made]))
    differences: list[str] = []
    for reference in known_references(record):
        form = Form(f"registry {reference.name}", reference.digest)
        try:
            config, _ = read_manifest(reference)
            if config != record["oci_digest"]:
                differences.append(f"{form.name}: its manifest names another config: {config}")
        except PostTrainingError as error:
            form.notes.append(error.problem)
        forms.append(form)
    image = {key: record[key] for key in ("name", "version", "platform", "oci_digest")}
    return Passport(image, forms, [*differences, *_compare(record, forms)])


def tree_hash(root: Path) -> str:
    """sha256 over [path, kind, mode, owner, group, content] of every path below `root`, sorted.

    content: the sha256 of a file, the target of a link, the number of a device. Left out are times,
    the root folder itself, and what one form alone has.
    """
    entries = sorted(_walk(root, ""))
    files = [path for path, status in entries if stat.S_ISREG(status.st_mode)]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = pool.map(lambda path: sha256_file(root / path), files)
        hashes = dict(zip(files, found, strict=True))
    total = hashlib.sha256()
    for path, status in entries:
        kind, content = stat.S_IFMT(status.st_mode), hashes.get(path)
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(root / path)
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            content = str(status.st_rdev)
        line = [path, kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, content]
        total.update(json.dumps(line).encode() + b"\n")
    return total.hexdigest()


def _walk(root: Path, below: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(root / below) as entries:
        for entry in entries:
            path = f"{below}/{entry.name}" if below else entry.name
            if path in _OF_ONE_FORM:
                continue
            status = entry.stat(follow_symlinks=False)
            yield path, status
            if stat.S_ISDIR(status.st_mode):
                yield from _walk(root, path)


def _compare(record: Mapping[str, Any], forms: list[Form]) -> list[str]:
    """A line for each thing in which a form differs from the first that has it."""
    lines = []
    for what in ("tree", "environment", "entrypoint"):
        known = [form for form in forms if getattr(form, what) is not None]
        for form in known[1:]:
            first, other = getattr(known[0], what), getattr(form, what)
            if first != other:
                told = _first_variable(first, other) if what == "environment" else other
                lines.append(f"{form.name}: its {what} is not that of the {known[0].name}: {told}")
    lines += [
        f"{form.name}: started, it says otherwise: {'; '.join(form.notes)}"
        for form in forms
        if form.started is False
    ]
    recorded = dict(record.get("environment", {}))
    for form in forms:
        if form.environment is not None and recorded and form.environment != recorded:
            lines.append(
                f"{form.name}: its environment is not that of the record: "
                f"{_first_variable(recorded, form.environment)}"
            )
    return lines


def _first_variable(first: Mapping[str, str], other: Mapping[str, str]) -> str:
    name = next(n for n in sorted({*first, *other}) if first.get(n) != other.get(n))
    return f"{name} is {first.get(name)!r}, then {other.get(name)!r}"


def _oci(record: Mapping[str, Any], store: ImageStore) -> Form:
    form = Form("OCI", record["oci_digest"])
    tags = [tag for tag, digest in _stored_tags(form).items() if digest == record["oci_digest"]]
    if not tags:
        form.notes.append("it is not in the builder's storage")
        return form
    stored = builder.stored_image(tags[0])
    form.environment = stored and stored.environment

    def read() -> None:
        with mounted_image(tags[0], store) as root:
            _read_tree(form, root)

    _try(form, read)
    _start(
        form,
        record,
        lambda: builder.run_in(tags[0], record["platform"], _ASK),
    )
    return form


def _stored_tags(form: Form) -> dict[str, str]:
    if shutil.which(builder.program()) is None:
        form.notes.append("no builder on this machine")
        return {}
    return builder.stored_tags()


def _squashfs(record: Mapping[str, Any], store: ImageStore) -> Form:
    form = Form("squashfs", record["sqsh_sha256"])
    image = store.image_path(record["sqsh_sha256"])
    if not image.exists():
        form.notes.append("its file is gone")
        return form

    def read() -> None:
        with mounted_squashfs(image) as root:
            _read_tree(form, root)
            variables = root / "etc/environment"
            form.environment = (
                parse_environment(variables.read_text()) if variables.exists() else {}
            )

    def ask() -> str:
        with tempfile.TemporaryDirectory(prefix="post-training-") as folder:
            edf = Path(folder) / "passport.toml"
            keys = {"image": str(image), "entrypoint": False, "writable": False}
            write_atomic(edf, edf_text(keys, {"env": image_environment(record, image)}))
            runner = [sys.executable, "-m", "post_training.cli", "edf", "run", edf, "--"]
            return run_tool([*runner, "sh", "-c", _ASK])

    _try(form, read)
    _start(form, record, ask)
    return form


def _sif(record: Mapping[str, Any], store: ImageStore, squashfs: Form) -> Form:
    form = Form("SIF", record["sif_sha256"])
    image = store.sif_path(record["sif_sha256"])
    if not image.exists():
        form.notes.append("its file is gone")
        return form

    def read() -> None:
        partition = sif_partition(image)
        if partition.sha256 == record["sqsh_sha256"] and squashfs.tree is not None:
            form.tree, form.entrypoint = squashfs.tree, squashfs.entrypoint  # The very same bytes.
        with mounted_squashfs(image, partition.offset) as root:
            if form.tree is None:
                _read_tree(form, root)
            form.environment = dict(_EXPORT.findall((root / _SINGULARITY_ENVIRONMENT).read_text()))

    _try(form, read)
    program = next(filter(shutil.which, ("apptainer", "singularity")), None)
    if program is None:
        form.notes.append("not started: neither Apptainer nor Singularity is on this machine")
    else:
        words = [program, "--silent", "exec", "--cleanenv", image, "sh", "-c", _ASK]
        _start(form, record, lambda: run_tool(words))
    return form


def _read_tree(form: Form, root: Path) -> None:
    form.tree = tree_hash(root)
    program = root / "opt/post-training/bin" / _ENTRYPOINT
    form.entrypoint = sha256_file(program) if program.is_file() else "none"


def _try(form: Form, read: Callable[[], None]) -> None:
    """Read the form; what is in the way becomes a note."""
    try:
        read()
    except (PostTrainingError, OSError) as error:
        form.notes.append(f"not read: {_last_line(error)}")


def _start(form: Form, record: Mapping[str, Any], ask: Callable[[], str]) -> None:
    """Start the form and compare what it says from inside with the image's record."""
    if not _can_run(record["platform"]):
        form.notes.append(f"not started: {record['platform']} does not run on this machine")
        return
    try:
        said = ask()
    except PostTrainingError as error:
        form.notes.append(f"not started: {_last_line(error)}")
        return
    place, _, rest = said.partition("\n")
    variables = dict(line.split("=", 1) for line in rest.split("\0") if "=" in line)
    wrong = [
        f"{name} is {variables.get(name)!r}, not {value!r}"
        for name, value in record.get("environment", {}).items()
        if variables.get(name) != value
    ]
    if form.entrypoint not in (None, "none") and not place.endswith(f"/{_ENTRYPOINT}"):
        wrong.append(f"no program {_ENTRYPOINT!r} in PATH")
    form.started = not wrong
    form.notes += wrong


def _last_line(error: Exception) -> str:
    """Of a program that failed: the last line of its output."""
    lines = [line.strip() for line in str(error).splitlines()]
    return [line for line in lines if line and not line.startswith("hint: ")][-1]


def _can_run(wanted: str) -> bool:
    if _ARCHITECTURES.get(platform.machine()) == wanted:
        return True
    machine = next((m for m, name in _ARCHITECTURES.items() if name == wanted), None)
    return machine is not None and (_EMULATORS / f"qemu-{machine}").exists()
