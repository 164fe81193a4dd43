"""Locking a base that lies in a registry, or in an OCI folder: a digest is read, or there is none.

skopeo is a fake that answers from a folder and notes its arguments; for OCI folders the real one.
"""

import hashlib
import json
from pathlib import Path

import pytest

from post_training.core.errors import UsageError
from post_training.images.registry import lock_registry_base, read_registry_base

IMAGE = "registry.example:5000/cuda/base:13"
NAME = "registry.example:5000/cuda/base"
SKOPEO = """#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/asked"
file="$here/$(echo "$4" | tr '/:@' '___')"
[ -e "$file" ] || { echo "no route to host" >&2; exit 1; }
cat "$file"
"""


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def manifest(seed: str) -> bytes:
    # Spaces and a line break at the end: the digest is of the bytes, not of the JSON.
    return (json.dumps({"config": {"digest": digest_of(seed.encode())}}, indent=3) + "\n").encode()


def index_of(platforms: dict[str, bytes]) -> bytes:
    entries = [
        {"digest": digest_of(data), "platform": {"os": "linux", "architecture": architecture}}
        for architecture, data in platforms.items()
    ]
    return json.dumps({"schemaVersion": 2, "manifests": entries}).encode()


TWICE = json.loads(index_of({"arm64": manifest("arm")}))
TWICE["manifests"] *= 2


class Registry:
    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        (folder / "skopeo").write_text(SKOPEO)
        (folder / "skopeo").chmod(0o755)

    def serve(self, reference: str, data: bytes) -> None:
        (self.folder / f"docker://{reference}".translate(str.maketrans("/:@", "___"))).write_bytes(
            data
        )

    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().splitlines()


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Registry:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return Registry(tmp_path / "bin")


@pytest.fixture
def lock(tmp_path) -> Path:
    (tmp_path / "gh200").mkdir()
    return tmp_path / "gh200/base.lock"


def test_lock_base_takes_the_platforms_manifest_of_an_index(registry, lock):
    arm, amd = manifest("arm"), manifest("amd")
    index = index_of({"amd64": amd, "arm64": arm})
    registry.serve(IMAGE, index)
    registry.serve(f"{NAME}@{digest_of(arm)}", arm)
    assert lock_registry_base(lock, IMAGE, "linux/arm64", None) is None
    assert read_registry_base(lock, IMAGE, "linux/arm64") == f"{NAME}@{digest_of(arm)}"
    written = json.loads(lock.read_text())
    assert written["index_digest"] == digest_of(index)
    assert written["config_digest"] == digest_of(b"arm")
    assert registry.asked() == [
        f"--command-timeout=2m inspect --raw docker://{IMAGE}",
        f"--command-timeout=2m inspect --raw docker://{NAME}@{digest_of(arm)}",
    ]


def test_lock_base_single_image_and_a_mirror(registry, lock):
    registry.serve("mirror.example/base:13", manifest("one"))
    source = "docker://mirror.example/base:13"
    assert lock_registry_base(lock, IMAGE, "linux/arm64", source) is None
    expected = f"{NAME}@{digest_of(manifest('one'))}"
    assert read_registry_base(lock, IMAGE, "linux/arm64") == expected


def test_lock_base_unreachable_registry_stays_unresolved_and_is_not_built(registry, lock):
    reason = lock_registry_base(lock, IMAGE, "linux/arm64", None)
    assert "no route to host" in reason
    assert json.loads(lock.read_text())["digest"] == "unresolved"
    with pytest.raises(UsageError, match=r"no digest: \S+ could not be read") as error:
        read_registry_base(lock, IMAGE, "linux/arm64")
    assert "`post-training image lock gh200`" in error.value.hint


def test_lock_base_that_was_resolved_keeps_its_digest_when_the_registry_is_gone(registry, lock):
    registry.serve(IMAGE, manifest("one"))
    lock_registry_base(lock, IMAGE, "linux/arm64", None)
    before = lock.read_text()
    reason = lock_registry_base(lock, IMAGE, "linux/arm64", "docker://gone.example/base:13")
    assert reason.endswith("the digest of an earlier time is kept")
    assert lock.read_text() == before


@pytest.mark.parametrize(
    ("served", "reason"),
    [
        (b"<html>blocked</html>", "skopeo printed no manifest"),
        (index_of({"amd64": manifest("amd")}), "0 images for linux/arm64 in it"),
        (json.dumps(TWICE).encode(), "2 images for linux/arm64 in it"),
        (b'{"schemaVersion": 2}', "not an image"),
    ],
)
def test_lock_base_what_is_no_image_for_the_platform_stays_unresolved(
    registry, lock, served, reason
):
    registry.serve(IMAGE, served)
    assert reason in lock_registry_base(lock, IMAGE, "linux/arm64", None)
    assert json.loads(lock.read_text())["digest"] == "unresolved"


def test_lock_base_manifest_of_other_bytes_than_its_digest_stays_unresolved(registry, lock):
    arm = manifest("arm")
    registry.serve(IMAGE, index_of({"arm64": arm}))
    registry.serve(f"{NAME}@{digest_of(arm)}", arm + b" ")
    assert "its bytes hash to" in lock_registry_base(lock, IMAGE, "linux/arm64", None)
    assert json.loads(lock.read_text())["digest"] == "unresolved"


def test_read_base_of_another_image_or_platform_is_refused(registry, lock):
    registry.serve(IMAGE, manifest("one"))
    lock_registry_base(lock, IMAGE, "linux/arm64", None)
    with pytest.raises(UsageError, match=r"image is .*:13, recipe.toml asks for .*:14"):
        read_registry_base(lock, f"{NAME}:14", "linux/arm64")
    with pytest.raises(UsageError, match=r"platform is linux/arm64, recipe.toml asks for"):
        read_registry_base(lock, IMAGE, "linux/amd64")


@pytest.mark.parametrize("is_index", [False, True])
def test_lock_base_from_an_oci_folder_by_the_real_skopeo(tmp_path, lock, is_index):
    config = b"{}"
    image = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest_of(config),
                "size": len(config),
            },
            "layers": [],
        }
    ).encode()
    blobs = tmp_path / "layout/blobs/sha256"
    blobs.mkdir(parents=True)
    kind, named = "image.manifest", image
    if is_index:
        kind, named = "image.index", index_of({"arm64": image, "amd64": b"absent"})
    for data in (config, image, named):
        (blobs / digest_of(data).removeprefix("sha256:")).write_bytes(data)
    entry = {
        "mediaType": f"application/vnd.oci.{kind[:5]}.{kind[6:]}.v1+json",
        "digest": digest_of(named),
        "size": len(named),
        "annotations": {"org.opencontainers.image.ref.name": "13"},
    }
    (tmp_path / "layout/oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    top = {"schemaVersion": 2, "manifests": [entry]}
    (tmp_path / "layout/index.json").write_text(json.dumps(top))
    assert lock_registry_base(lock, IMAGE, "linux/arm64", f"oci:{tmp_path}/layout:13") is None
    assert read_registry_base(lock, IMAGE, "linux/arm64") == f"{NAME}@{digest_of(image)}"
