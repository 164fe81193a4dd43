"""Share images through a registry, by digest: `post-training image push` and `image pull`.

    push   the builder's image   --skopeo-->  REGISTRY/NAME:VERSION-<config digest>
           its record            --------->   REGISTRY/NAME:sha256-<manifest digest>.record
    pull   REGISTRY/NAME@sha256:<manifest digest>  -->  the builder's image  -->  squashfs, record

A manifest names its config and layers by digest, and is named by its own: what is pulled is proved
by hashing it, and a tag that was moved changes nothing. Compressed layers decide the manifest's
digest; the config's, by which an image is known here, is of the uncompressed ones. The record says
where its image is (`registries`), and a record in a registry is an OCI artifact. It proves nothing:
what it says of the image is compared, and its commit is a claim, as in a store.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError, tell
from post_training.core.hashing import sha256_text
from post_training.images import builder
from post_training.images.build import BuiltImage
from post_training.images.identity import read_image, seal
from post_training.images.push import mounted_image, pack_sqsh
from post_training.images.reference import DIGEST, Reference, known_references
from post_training.images.skopeo import pull_to_builder, run_skopeo, tls_options
from post_training.images.store import RECORD_SCHEMA, ImageStore

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_RECORD = "application/vnd.post-training.image-record.v1+json"
# Tags of what is in the builder's storage during a pull alone.
_PULLED = "localhost/post-training/pulled:"
_EMPTY = "application/vnd.oci.empty.v1+json"
# Of a record that comes with an image: what the image says too.
_COMPARED = ("name", "version", "input_hash", "base", "base_sha256", "lock_sha256", "platform")


def push_image(record: Mapping[str, Any], name: str, store: ImageStore) -> Reference:
    """Copy the image of a stored record to the registry, and the record beside it; where it is now.

    name: as of `parse_name`. The record in the store gets the reference too.
    Errors: UsageError when neither the builder nor a registry has the image as it was built.
    """
    tag = f"{record['version']}-{_hex(record['oci_digest'])[:16]}"
    target = f"docker://{name}:{tag}"
    source, options = _source(record)
    tell(f"copying {record['name']} {record['version']} to {name}:{tag} …")
    with tempfile.TemporaryDirectory(prefix="post-training-") as temporary:
        written = Path(temporary) / "digest"
        run_skopeo(
            ["copy", "--quiet", *options, *tls_options("dest-", name), f"--digestfile={written}",
             source, target],
            name,
        )  # fmt: skip
        reference = Reference(name, written.read_text().strip())
    # Read back: a registry may convert what it gets.
    config, manifest_bytes = read_manifest(reference)
    if config != record["oci_digest"]:
        raise PostTrainingError(
            f"the registry made another image of it: its config is {config}, and was "
            f"{record['oci_digest']}",
            where=str(reference),
        )
    with store.lock():
        current = store.record(record["sqsh_sha256"])
        registries = {**current.get("registries", {}), name: reference.digest}
        current = store.add({**current, "registries": registries})
    _push_record(current, reference, manifest_bytes)
    return reference


def pull_image(
    reference: Reference, store: ImageStore, expected: str | None = None
) -> dict[str, Any]:
    """Get the image into the store as a squashfs, unless the store has it; its record.

    expected: the config digest that it must have.
    Errors: PostTrainingError when it is another image, no image of ours, or not to be had.
    """
    config, _ = read_manifest(reference)
    if expected not in (None, config):
        raise PostTrainingError(
            f"it is another image: its config is {config}, wanted is {expected}",
            where=str(reference),
        )
    if (stored := _stored(config, store)) is not None:
        with store.lock():
            registries = {**stored.get("registries", {}), reference.name: reference.digest}
            return store.add({**stored, "registries": registries})
    told = _pull_record(reference)
    _remove_leftovers(store)
    with store.work_folder() as work:
        tag = pull_tag(store, work)
        try:
            pull_to_builder(reference, tag)
            return _pack(tag, config, told, reference, store)
        finally:
            builder.remove(tag)


def pull_tag(store: ImageStore, work: Path) -> str:
    """The tag in the builder's storage of one pull: several may get one image at once.

    work: the pull's work folder, by whose lock others see that it is running.
    """
    return f"{_PULLED}{sha256_text(str(store.folder))[:16]}{work.name}"


def _remove_leftovers(store: ImageStore) -> None:
    """Remove from the builder's storage what killed pulls into this store left there."""
    abandoned = store.abandoned_work()
    ours = pull_tag(store, Path())
    for tag in builder.stored_tags():
        if tag.startswith(ours):
            work = store.folder / tag.removeprefix(ours)
            if work in abandoned or not work.exists():
                builder.remove(tag)


def _pack(
    tag: str,
    config: str,
    told: Mapping[str, Any] | None,
    reference: Reference,
    store: ImageStore,
) -> dict[str, Any]:
    """Put the pulled image into the store; its record. told: the record that came with it."""
    pulled = builder.stored_image(tag)
    if pulled is None or pulled.oci_digest != config:
        found = pulled and pulled.oci_digest
        raise PostTrainingError(
            f"the image that was pulled is {found}, its manifest names {config}",
            where=str(reference),
        )
    with store.lock(), mounted_image(tag, store) as root:
        said = read_image(root)
    if said is None or any(key not in said for key in _COMPARED):
        raise PostTrainingError(
            "not an image of this project: it has no /etc/post-training/image.json",
            where=str(reference),
        )
    identity = {key: value for key, value in said.items() if key != "oci_digest"}
    more: dict[str, Any] = {"registries": {reference.name: reference.digest}}
    if told is not None:
        expected = {**identity, "oci_digest": config}
        if wrong := [key for key in (*_COMPARED, "oci_digest") if told[key] != expected[key]]:
            raise PostTrainingError(
                f"the record beside it is not that of the image: {', '.join(wrong)}",
                where=str(reference),
            )
        more["builder"] = told["builder"]
        more["registries"] = {**told.get("registries", {}), **more["registries"]}
    image = BuiltImage(tag, config, identity, pulled.labels, pulled.environment)
    record = pack_sqsh(image, store, told and told["checkout"], more)
    if told is not None and told["sqsh_sha256"] != record["sqsh_sha256"]:
        tell(
            "note: its squashfs has other bytes than where it was pushed from "
            f"({record['builder'].get('mksquashfs')}); the image is the same"
        )
    return record


def _stored(oci_digest: str, store: ImageStore) -> dict[str, Any] | None:
    """The record of a complete image in the store, or None."""
    for entry in store.index():
        if entry["oci_digest"] == oci_digest and store.file_fault(entry) is None:
            return store.record(entry["sqsh_sha256"])
    return None


def _source(record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """(where skopeo finds the image as it was built, options to read it)."""
    wanted = record["oci_digest"]
    for tag, digest in builder.stored_tags().items():
        if digest == wanted:
            return f"containers-storage:{tag}", []
    # From one registry to another its layers stay as they are, and so does its manifest.
    for reference in known_references(record):
        return f"docker://{reference}", ["--preserve-digests", *tls_options("src-", reference.name)]
    commit = (record.get("checkout") or {}).get("commit")
    raise UsageError(
        f"{record['name']} {record['version']} is in the store as a squashfs only, and its digest "
        "is that of the layers it was built from",
        where=wanted,
        hint="`post-training image build` in a checkout of "
        f"{f'commit {commit[:12]}' if commit else 'its sources'} makes them again",
    )


def _push_record(record: Mapping[str, Any], reference: Reference, manifest_bytes: int) -> None:
    """Put the record beside its image: an artifact of one layer, with the image as its subject."""
    content = json.dumps(record, indent=2, sort_keys=True).encode()
    subject = {"mediaType": _MANIFEST, "digest": reference.digest, "size": manifest_bytes}
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "artifactType": _RECORD,
        "config": {"mediaType": _EMPTY, "digest": _sha256(b"{}"), "size": 2},
        "layers": [{"mediaType": _RECORD, "digest": _sha256(content), "size": len(content)}],
        "subject": subject,
    }
    with tempfile.TemporaryDirectory(prefix="post-training-") as folder:
        for data in (content, b"{}"):
            (Path(folder) / _hex(_sha256(data))).write_bytes(data)
        (Path(folder) / "manifest.json").write_text(json.dumps(manifest))
        (Path(folder) / "version").write_text("Directory Transport Version: 1.1\n")
        place = f"docker://{_record_tag(reference)}"
        run_skopeo(
            ["copy", "--quiet", *tls_options("dest-", reference.name), f"dir:{folder}", place],
            reference.name,
        )


def _pull_record(reference: Reference) -> dict[str, Any] | None:
    """The record beside an image in a registry; None where there is none, with a word about it."""
    place = _record_tag(reference)
    with tempfile.TemporaryDirectory(prefix="post-training-") as folder:
        try:
            run_skopeo(
                ["copy", "--quiet", *tls_options("src-", reference.name), f"docker://{place}",
                 f"dir:{folder}"],
                reference.name,
            )  # fmt: skip
        except PostTrainingError as error:
            if "no such image" not in error.problem:
                raise
            tell(f"note: no record beside it ({place}): its commit is unknown")
            return None
        try:
            manifest = json.loads((Path(folder) / "manifest.json").read_text())
            [layer] = manifest["layers"]
            told = json.loads((Path(folder) / _hex(layer["digest"])).read_text())
            if told["schema"] != RECORD_SCHEMA or told["seal"] != seal(told):
                raise ValueError
            _ = [told[key] for key in (*_COMPARED, "oci_digest", "builder", "checkout")]
        except (OSError, ValueError, KeyError, TypeError):
            raise PostTrainingError(
                "the record beside the image is damaged or was changed", where=place
            ) from None
    return told


def _record_tag(reference: Reference) -> str:
    return f"{reference.name}:sha256-{_hex(reference.digest)}.record"


def read_manifest(reference: Reference) -> tuple[str, int]:
    """(the digest of the image's config, the manifest's bytes).

    Errors: PostTrainingError for other bytes than the digest's, and for an index of several images.
    """
    data = run_skopeo(
        # Without a limit skopeo waits for ever for a registry that does not answer.
        ["--command-timeout=2m", "inspect", "--raw", *tls_options("", reference.name),
         f"docker://{reference}"],
        reference.name,
    )  # fmt: skip
    if _sha256(data) != reference.digest:
        raise PostTrainingError(
            f"its content is not what its digest says: it hashes to {_sha256(data)}",
            where=str(reference),
        )
    manifest = json.loads(data)
    if "manifests" in manifest:
        listed = ", ".join(
            f"{(entry.get('platform') or {}).get('architecture')} {entry['digest']}"
            for entry in manifest["manifests"]
        )
        raise PostTrainingError(
            "it is a list of images for several platforms", where=str(reference), hint=listed
        )
    config = (manifest.get("config") or {}).get("digest", "")
    if not DIGEST.fullmatch(config):
        raise PostTrainingError("no image: its manifest names no config", where=str(reference))
    return config, len(data)


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
