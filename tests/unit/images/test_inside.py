"""What the inside of an image says of paths that are not there."""

import json
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError, UsageError
from post_training.images.edf import Edf
from post_training.images.identity import IMAGE_FILE, seal
from post_training.images.inside import explain_missing, identify_image
from post_training.images.render import image_environment
from post_training.images.runner import image_file
from post_training.images.store import RECORD_SCHEMA, ImageStore

MOUNTED = ["/work/me:/work/me", "/data:/d:ro"]


@pytest.mark.parametrize(
    ("path", "start"),
    [
        ("/models/Apertus", "/models/Apertus is not below a folder that is mounted in the image "
         "(/work/me, /d): `post-training edf run --mount /models/Apertus:/models/Apertus …`"),
        ("/data/x", "/data/x is not below"),  # It is mounted as /d.
        ("org/name-1.5B", "org/name-1.5B looks like a name on the Hugging Face hub"),
    ],
)  # fmt: skip
def test_explain_missing_says_what_may_be_the_matter(path, start):
    assert explain_missing(Path(path), MOUNTED).startswith(start)


@pytest.mark.parametrize("path", ["/work/me/typo", "/d/typo"])
def test_explain_missing_of_a_mounted_folder_is_none(path):
    assert explain_missing(Path(path), MOUNTED) is None
    assert explain_missing(Path("/models/x"), None) is None  # No image.


def test_explain_missing_of_a_link_names_where_it_leads(tmp_path):
    (tmp_path / "SmolLM2").symlink_to("/models/SmolLM2")
    hint = explain_missing(tmp_path / "SmolLM2", [f"{tmp_path}:{tmp_path}"])
    assert hint.startswith("/models/SmolLM2 is not below")


NAME = "ghcr.io/me/cpu"
REFERENCE = f"{NAME}@sha256:{'7' * 64}"
SAID = {"name": "cpu", "version": "1", "input_hash": "1" * 64}
RECORD = {
    "schema": RECORD_SCHEMA,
    **SAID,
    "oci_digest": "sha256:" + "2" * 64,
    "sqsh_sha256": "3" * 64,
    "size_bytes": 4,
    "pushed": "2026-01-01T00:00:00+00:00",
    "checkout": {"commit": "c" * 40, "dirty": False},
    "registries": {NAME: "sha256:" + "7" * 64},
}


@pytest.fixture
def store(tmp_path, monkeypatch) -> ImageStore:
    """With the record of the image in which this process seems to run."""
    root = tmp_path / "root"
    (root / IMAGE_FILE.relative_to("/")).parent.mkdir(parents=True)
    (root / IMAGE_FILE.relative_to("/")).write_text(json.dumps(SAID))
    monkeypatch.setattr("post_training.images.inside.ROOT", root)
    monkeypatch.setattr("post_training.images.inside.FINDINGS", tmp_path / "none")
    store = ImageStore(tmp_path / "store")
    with store.lock():
        store.add(RECORD)
    return store


def test_image_from_a_registry_is_verified_by_its_record(store):
    path = store.record_path("3" * 64)
    found = identify_image(image_environment(RECORD, REFERENCE, path))
    assert (found["verified_by"], found["check"]) == ("entrypoint", "reference")
    assert (found["path"], found["registries"]) == (REFERENCE, RECORD["registries"])
    assert found["checkout"] == RECORD["checkout"]
    # Without a store nobody says which image the digest is of.
    found = identify_image(image_environment(RECORD, REFERENCE, path.with_name("gone")))
    assert (found["verified_by"], found["check"]) == ("declared", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registries": {NAME: "sha256:" + "8" * 64}}, "knows sha256:8888"),
        ({"registries": {}}, "knows no digest under this name"),
        ({"input_hash": "9" * 64}, "is not that of this image: input_hash"),
        ({"oci_digest": "sha256:" + "9" * 64}, "the image's OCI digest is sha256:9999"),
        ({"seal": "0" * 64}, "the record was changed after the push"),
    ],
)
def test_image_from_a_registry_that_its_record_does_not_know_is_refused(store, change, message):
    record = {**RECORD, **change}
    store.record_path("3" * 64).write_text(json.dumps({"seal": seal(record), **record}))
    with pytest.raises(PostTrainingError, match=message):
        identify_image(image_environment(RECORD, REFERENCE, store.record_path("3" * 64)))


def test_our_runner_takes_an_image_of_a_registry_from_the_store(store, monkeypatch):
    def edf(image: str) -> Edf:
        return Edf(Path("x.toml"), image, None, False, False, (), (), {}, {})

    monkeypatch.setenv("POST_TRAINING_IMAGE_STORE", str(store.folder))
    assert image_file(edf(REFERENCE)) == store.image_path("3" * 64)
    other = REFERENCE.replace("7", "8")
    with pytest.raises(UsageError, match="is not in the image store") as caught:
        image_file(edf(other))
    assert f"post-training image pull {other}" in str(caught.value)
