"""The image, its record and the variables say the same of it, or nothing is started."""

import json
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError
from post_training.images.identity import check_identity, read_image, read_record_beside, seal

SAID = {
    "name": "cpu", "version": "1.2.3", "input_hash": "1" * 64, "base_sha256": "4" * 64,
    "base": "locked", "lock_sha256": {"requirements.lock": "5" * 64}, "platform": "linux/amd64",
    "oci_digest": "sha256:" + "2" * 64,
}  # fmt: skip
RECORD = {**SAID, "sqsh_sha256": "3" * 64, "checkout": {"commit": "6" * 40, "dirty": False}}
PINS = {
    "POST_TRAINING_IMAGE_INPUT_HASH": "1" * 64,
    "POST_TRAINING_IMAGE_OCI_DIGEST": "sha256:" + "2" * 64,
    "POST_TRAINING_IMAGE_SQSH_SHA256": "3" * 64,
}


def sealed(**changes) -> dict:
    record = {**RECORD, **changes}
    return {**record, "seal": seal(record)}


def unpacked(**changes) -> dict:
    """As an image says it that was pushed before it held its OCI digest."""
    return {**SAID, "oci_digest": None, **changes}


def test_check_identity_of_equal_claims_is_bound():
    assert check_identity(PINS, SAID, sealed())
    assert check_identity(PINS, SAID, None)
    assert check_identity(PINS, unpacked(), RECORD)


def test_check_identity_where_only_the_variable_says_the_digest_is_not_bound():
    assert not check_identity(PINS, unpacked(), None)


@pytest.mark.parametrize("said", [SAID, unpacked()])
def test_check_identity_claimed_digest_that_is_not_the_images_is_refused(said):
    claim = {**PINS, "POST_TRAINING_IMAGE_OCI_DIGEST": "sha256:" + "a" * 64}
    with pytest.raises(PostTrainingError, match=r"OCI digest is sha256:2222.* claims sha256:aaaa"):
        check_identity(claim, said, sealed())


def test_check_identity_other_inputs_or_an_image_not_ours_are_refused():
    claim = {**PINS, "POST_TRAINING_IMAGE_INPUT_HASH": "9" * 64}
    with pytest.raises(PostTrainingError, match=f"input hash is {'1' * 64}, the EDF pins 9999"):
        check_identity(claim, SAID, None)
    with pytest.raises(PostTrainingError, match="input hash is nothing"):
        check_identity(PINS, None, None)


@pytest.mark.parametrize(
    ("changes", "altered"),
    [
        ({"oci_digest": "sha256:" + "0" * 64}, "oci_digest"),
        ({"input_hash": "0" * 64}, "input_hash"),
        ({"base_sha256": "0" * 64}, "base_sha256"),
        ({"sqsh_sha256": "0" * 64}, "sqsh_sha256"),
        ({"version": "2", "name": "x"}, "name, version"),
        ({"base": "unlocked"}, "base"),
        ({"lock_sha256": {}}, "lock_sha256"),
        ({"platform": "linux/arm64"}, "platform"),
    ],
)
def test_check_identity_altered_record_is_refused_sealed_anew_or_not(changes, altered):
    for record in (sealed(**changes), {**sealed(), **changes}):
        with pytest.raises(PostTrainingError, match=f"is not that of this image: {altered}"):
            check_identity(PINS, SAID, record)


def test_check_identity_altered_commit_is_noticed_by_the_seal():
    other = {"checkout": {"commit": "deadbeef", "dirty": False}}
    with pytest.raises(PostTrainingError, match="is not that of this image: seal"):
        check_identity(PINS, SAID, {**sealed(), **other})
    taken_off = {key: value for key, value in sealed(**other).items() if key != "seal"}
    with pytest.raises(PostTrainingError, match="is not that of this image: seal"):
        check_identity(PINS, SAID, taken_off)


def test_read_image_takes_the_digest_that_was_packed(tmp_path):
    folder = tmp_path / "etc/post-training"
    folder.mkdir(parents=True)
    assert read_image(tmp_path) is None
    said = {key: value for key, value in SAID.items() if key != "oci_digest"}
    (folder / "image.json").write_text(json.dumps(said))
    assert read_image(tmp_path) == unpacked()
    (folder / "oci-digest").write_text(SAID["oci_digest"] + "\n")
    assert read_image(tmp_path) == SAID


@pytest.mark.parametrize("text", ["{", "[]", "{}", "null"])
def test_damaged_files_are_one_line_each(tmp_path, text):
    folder = tmp_path / "etc/post-training"
    folder.mkdir(parents=True)
    (folder / "image.json").write_text(text)
    with pytest.raises(PostTrainingError) as raised:
        read_image(tmp_path)
    assert raised.value.where == str(folder / "image.json")
    record = tmp_path / f"sha256-{'3' * 64}.json"
    assert read_record_beside(tmp_path / "x.sqsh", "3" * 64) is None
    record.write_text(text)
    with pytest.raises(PostTrainingError) as raised:
        read_record_beside(Path(tmp_path / "x.sqsh"), "3" * 64)
    assert raised.value.where == str(record)
