"""The store and the commands on it, on small squashfs images of this test's own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from post_training.core.errors import UsageError
from post_training.core.hashing import sha256_file
from post_training.images.push import make_squashfs
from post_training.images.store import RECORD_SCHEMA, ImageStore

OCI = {"a": "sha256:" + "a1" * 32, "b": "sha256:" + "b2" * 32}


@pytest.fixture
def store(tmp_path) -> ImageStore:
    """A store with the images `a` 1.0 and `b` 2.0; `b` was pushed last."""
    store = ImageStore(tmp_path / "store")
    for number, (name, oci_digest) in enumerate(OCI.items(), 1):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name * 5000)
        packed = tmp_path / f"{name}.sqsh"
        subprocess.run(
            ["mksquashfs", tmp_path / name, packed, "-quiet", "-no-progress"], check=True
        )
        digest = sha256_file(packed)
        with store.lock():
            packed.rename(store.image_path(digest))
            store.add(
                {
                    "schema": RECORD_SCHEMA,
                    "name": name,
                    "version": f"{number}.0",
                    "input_hash": name * 64,
                    "oci_digest": oci_digest,
                    "sqsh_sha256": digest,
                    "size_bytes": store.image_path(digest).stat().st_size,
                    "pushed": f"2026-01-0{number}T00:00:00+00:00",
                }
            )
    return store


def image(store: ImageStore, name: str) -> Path:
    return store.image_path(store.find(name)["sqsh_sha256"])


def test_find_takes_either_digest_prefixes_and_names(store):
    record = store.find("a")
    digest = record["sqsh_sha256"]
    for reference in ("a:1.0", digest, digest[:8], f"sha256:{digest}", f"sha256-{digest}.sqsh"):
        assert store.find(reference) == record
    for reference in (OCI["a"], "a1" * 32, "a1a1a1a1"):
        assert store.find(reference) == record


def test_lock_who_waits_for_another_writer_says_so(store):
    code = (
        "import pathlib, sys; from post_training.images.store import ImageStore\n"
        "with ImageStore(pathlib.Path(sys.argv[1])).lock(): print('mine')"
    )
    with store.lock():
        other = subprocess.Popen(
            [sys.executable, "-c", code, store.folder],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        said = other.stderr.readline()
    assert said == f"waiting for another build, push or pull in {store.folder} …\n"
    assert other.communicate() == ("mine\n", "")


def test_find_digits_of_two_images_are_refused(store):
    record = store.find("a")
    with store.lock():
        store.add({**record, "sqsh_sha256": "d" * 64, "oci_digest": "sha256:a1a1a1a1" + "e" * 56})
    with pytest.raises(UsageError, match=r"'a1a1a1a1' names 2 images\nhint: give more digits"):
        store.find("a1a1a1a1")
    assert store.find("a1a1a1a1a1") == record


def test_find_built_image_whose_file_is_gone_is_none(store):
    """So that it is built, or packed, anew."""
    record = store.find("a")
    assert store.find_built(record["input_hash"]) == record
    image(store, "a").unlink()
    assert store.find_built(record["input_hash"]) is None


@pytest.mark.parametrize("reference", ["nope", "a1a1a1a", "a:2.0", "c" * 64])
def test_image_show_unknown_reference_is_one_clear_line(store, post_training, reference):
    done = post_training("image", "show", reference, "--store", store.folder)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {store.folder}: no image {reference!r} in the store\n")


def test_image_list_is_the_index_last_pushed_first(store, post_training):
    listed = json.loads(post_training("image", "list", "--store", store.folder, "--json").stdout)
    assert [entry["name"] for entry in listed] == ["b", "a"]
    (store.folder / "index.json").unlink()
    again = json.loads(post_training("image", "list", "--store", store.folder, "--json").stdout)
    assert again == listed


def test_image_verify_flipped_byte_is_corrupt(store, post_training):
    def verify(name):
        done = post_training("image", "verify", name, "--store", store.folder)
        return done.returncode, done.stdout.split(":")[0]

    assert verify("a") == (0, "ok")
    content = bytearray(image(store, "a").read_bytes())
    content[200] ^= 1
    image(store, "a").write_bytes(content)
    assert verify("a") == (1, "corrupt")
    assert verify("b") == (0, "ok")
    image(store, "b").unlink()
    assert verify("b") == (1, "missing")
    done = post_training("image", "verify", "a", "--store", store.folder, "--json")
    [file] = json.loads(done.stdout)
    assert (done.returncode, file["status"], file["path"]) == (1, "corrupt", str(image(store, "a")))
    assert file["found"] != file["expected"]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"images": [{}]}', '{"images": 3}', '{"images": [{"name": null}]}'],
)
def test_image_list_damaged_index_is_made_anew_with_a_word(store, post_training, text):
    def listed():
        done = post_training("image", "list", "--store", store.folder, "--json")
        return json.loads(done.stdout), done.stderr

    before, _ = listed()
    path = store.folder / "index.json"
    path.write_text(text)
    assert listed() == (before, f"warning: {path}: damaged; made anew from the records\n")
    assert listed() == (before, "")


@pytest.mark.parametrize("change", ["{", "[]", "{}", "keys", "null", "other image", "edit"])
@pytest.mark.parametrize("verb", ["list", "show", "verify"])
def test_image_command_damaged_record_is_one_clear_line_that_names_it(
    store, post_training, verb, change
):
    record = store.find("a")
    path = store.record_path(record["sqsh_sha256"])
    (store.folder / "index.json").unlink()
    texts = {
        "keys": {key: record[key] for key in ("schema", "name", "sqsh_sha256")},
        "null": {**record, "pushed": None},
        "other image": {**record, "sqsh_sha256": "0" * 64},
        "edit": {**record, "checkout": {"commit": "deadbeef", "dirty": False}},
    }
    path.write_text(json.dumps(texts[change]) if change in texts else change)
    words = [] if verb == "list" else ["a"]
    done = post_training("image", verb, *words, "--store", store.folder)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: ")
    assert "Traceback" not in done.stderr


def test_image_list_and_doctor_name_a_missing_and_a_damaged_file(store, post_training):
    image(store, "a").unlink()
    image(store, "b").write_bytes(b"short")
    listed = json.loads(post_training("image", "list", "--store", store.folder, "--json").stdout)
    assert [entry["file"] for entry in listed] == ["damaged", "missing"]
    shown = post_training("image", "list", "--store", store.folder).stdout
    assert [word in shown for word in ("damaged", "missing")] == [True, True]
    said = post_training(
        "doctor", "--site", "laptop", POST_TRAINING_IMAGE_STORE=str(store.folder)
    ).stdout
    assert f"the file of a 1.0 is missing: {image(store, 'a')}" in said
    assert f"the file of b 2.0 is damaged: {image(store, 'b')}" in said


def test_make_squashfs_packs_the_oci_digest_with_the_same_bytes_again(tmp_path):
    (tmp_path / "tree/etc/post-training").mkdir(parents=True)
    for name in ("one", "two"):
        make_squashfs(tmp_path / "tree", tmp_path / name, OCI["a"])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    command = ["unsquashfs", "-cat", tmp_path / "one", "etc/post-training/oci-digest"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == OCI["a"] + "\n"


def test_abandoned_work_is_that_of_dead_processes_also_beside_the_bases(store):
    for folder in (store.folder / ".work-dead", store.folder / "bases/.work-dead"):
        folder.mkdir(parents=True)
        (folder / ".live").touch()
    with store.work_folder("bases") as live:
        found = {path.relative_to(store.folder).as_posix() for path in store.abandoned_work()}
        assert found == {".work-dead", "bases/.work-dead"}
        assert live.parent == store.folder / "bases"
        store.remove_abandoned_work()
        assert live.exists()
        assert not (store.folder / ".work-dead").exists()


def test_image_list_damaged_record_is_one_clear_line(store, post_training):
    path = store.record_path(store.find("a")["sqsh_sha256"])
    path.write_text("{")
    done = post_training("image", "show", "a", "--store", store.folder)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: not a JSON record")
