"""An image over a site's own SIF, as far as no Singularity is needed; tests/long runs one."""

import json
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import sha256_file
from post_training.images.edf import parse_mount
from post_training.images.identity import LAYER_FOLDERS, pair_digest
from post_training.images.inside import check_layer, mounts_over_code
from post_training.images.layer import layer_mounts, refuse_layer
from post_training.images.render import image_environment, render_edf
from post_training.images.site_sif import lock_site_sif, locked_site_sif
from post_training.images.store import RECORD_SCHEMA, ImageStore
from post_training.slurm.singularity import bind

RECORD = {
    "name": "rocm", "version": "1", "input_hash": "1" * 64, "sqsh_sha256": "3" * 64,
    "sif_sha256": "6" * 64, "oci_digest": pair_digest("6" * 64, "3" * 64),
    "base_sif": "/appl/base.sif", "environment": {"PYTHONNOUSERSITE": "1"},
}  # fmt: skip
STORE = ImageStore(Path("/store"))
MOUNT = "36 35 0:52 / {place} ro,nosuid - {kind} /dev/loop7 ro\n"


def sif(path: Path, architecture: bytes = b"02\0", magic: bytes = b"SIF_MAGIC\0") -> Path:
    path.write_bytes(b"#!/usr/bin/env run-singularity\n\0" + magic + b"01\0" + architecture)
    return path


def test_lock_site_sif_pins_what_a_link_leads_to(tmp_path):
    file = sif(tmp_path / "multitorch-20260807.sif")
    (tmp_path / "latest.sif").symlink_to(file)
    lock_site_sif(tmp_path / "base.lock", tmp_path / "latest.sif", "linux/amd64")
    lock = locked_site_sif(tmp_path)
    assert (lock["file"], lock["sha256"]) == (str(file), sha256_file(file))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"magic": b"SQUASHFS__"}, "is no SIF"),
        ({"architecture": b"04\0"}, "is for linux/arm64, the recipe is for linux/amd64"),
        (None, "no such file or directory"),
    ],
)
def test_lock_site_sif_of_another_file_is_refused_and_writes_nothing(tmp_path, made, told):
    if made is not None:
        sif(tmp_path / "x.sif", **made)
    with pytest.raises(UsageError, match=told):
        lock_site_sif(tmp_path / "base.lock", tmp_path / "x.sif", "linux/amd64")
    assert not (tmp_path / "base.lock").exists()


def test_locked_site_sif_of_a_registrys_base_is_none(tmp_path):
    lock = {"schema": "post-training/registry-base-lock/1", "digest": "unresolved"}
    (tmp_path / "base.lock").write_text(json.dumps(lock))
    assert locked_site_sif(tmp_path) is None


def test_layer_mounts_become_binds_of_the_folders_in_it():
    binds = [bind(str(parse_mount(text, Path("/")))) for text in layer_mounts(RECORD, STORE)]
    layer = f"/store/sha256-{'3' * 64}.sqsh"
    assert binds == [f"--bind={layer}:{name}:image-src={name}" for name in LAYER_FOLDERS]
    assert layer_mounts({"name": "cpu"}, STORE) == []


def test_image_environment_of_a_layer_has_what_its_programs_need():
    variables = image_environment(RECORD, STORE.sif_path("6" * 64))
    assert variables["PYTHONNOUSERSITE"] == "1"
    assert variables["POST_TRAINING_IMAGE_SIF_SHA256"] == "6" * 64


def test_layer_is_refused_where_a_whole_image_is_needed(tmp_path):
    (tmp_path / "here.toml").write_text("entrypoint = false\n")
    with pytest.raises(UsageError, match="lies over a site's SIF, and needs Singularity"):
        render_edf(tmp_path / "here.toml", RECORD, STORE)
    with pytest.raises(UsageError, match="lies over a site's SIF, and cannot be pushed"):
        refuse_layer(RECORD, "cannot be pushed")


@pytest.mark.parametrize("kind", ["squashfs", "fuse.squashfuse_ll"])
def test_mounts_over_code_leaves_out_the_layer_of_an_image_that_has_one(kind):
    table = "".join(MOUNT.format(place=place, kind=kind) for place in LAYER_FOLDERS)
    assert mounts_over_code(table, has_layer=True) == []
    assert mounts_over_code(table) == sorted(LAYER_FOLDERS)
    other = MOUNT.format(place="/opt/post-training", kind="ext4")
    assert mounts_over_code(other, has_layer=True) == ["/opt/post-training"]
    below = MOUNT.format(place="/opt/post-training/venv", kind=kind)
    assert mounts_over_code(below, has_layer=True) == ["/opt/post-training/venv"]


def test_check_layer_of_other_bytes_or_another_pair_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"layer")
    digest = sha256_file(tmp_path / "x")
    layer = (tmp_path / "x").rename(tmp_path / f"sha256-{digest}.sqsh")
    pins = {
        "SIF_SHA256": "6" * 64, "SQSH_SHA256": digest, "OCI_DIGEST": pair_digest("6" * 64, digest),
    }  # fmt: skip
    check_layer(tmp_path / "base.sif", pins)
    with pytest.raises(PostTrainingError, match="is not that of this SIF and this layer"):
        check_layer(tmp_path / "base.sif", {**pins, "SIF_SHA256": "7" * 64})
    layer.write_bytes(b"other")
    with pytest.raises(PostTrainingError, match="sha256 is"):
        check_layer(tmp_path / "base.sif", pins)


def test_store_removes_the_link_to_a_sif_with_its_last_layer_and_never_the_sif(tmp_path):
    file, store = sif(tmp_path / "site.sif"), ImageStore(tmp_path / "store")
    digest, records = sha256_file(file), []
    with store.lock():
        store.sif_path(digest).symlink_to(file)
        for content in (b"one", b"two"):
            (tmp_path / "layer").write_bytes(content)
            layer = sha256_file(tmp_path / "layer")
            (tmp_path / "layer").rename(store.image_path(layer))
            record = {
                **RECORD, "schema": RECORD_SCHEMA, "sqsh_sha256": layer, "sif_sha256": digest,
                "oci_digest": pair_digest(digest, layer), "size_bytes": len(content),
                "pushed": "2026-01-01T00:00:00+00:00",
            }  # fmt: skip
            records.append(store.add(record))
        assert {found.status for found in store.verify(records[0])} == {"ok"}
        store.remove(records[0])
        assert store.sif_path(digest).exists()
        assert not store.image_path(records[0]["sqsh_sha256"]).exists()
        store.remove(records[1])
    assert not store.sif_path(digest).is_symlink()
    assert file.exists()
