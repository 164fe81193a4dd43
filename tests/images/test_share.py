"""`image push` and `image pull`, with a real registry, on an image of three files."""

import base64
import json
import subprocess
from pathlib import Path

import pytest

from helpers.registry import PASSWORD, USER, serving
from helpers.small_images import COMMIT, forget_images, make_image
from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.process import run_tool
from post_training.images import builder
from post_training.images.identity import seal
from post_training.images.push import pack_sqsh
from post_training.images.reference import Reference, parse_reference
from post_training.images.share import pull_image, pull_tag, push_image
from post_training.images.store import ImageStore
from post_training.reproduce.plan import Options
from post_training.reproduce.verdict import fetch_image

pytestmark = [pytest.mark.image, pytest.mark.usefixtures("storage")]
# Of PASSWORD, by bcrypt.
PASSWORD_HASH = "$2y$05$UfneqUeHNULjkgTEV9ZwqewXXXZWoHIpIZwT7SKLgL6bgSJs2FTTe"


@pytest.fixture
def store(tmp_path) -> ImageStore:
    return ImageStore(tmp_path / "store")


@pytest.fixture
def elsewhere(tmp_path) -> ImageStore:
    """The store of a machine that has no image."""
    return ImageStore(tmp_path / "elsewhere")


@pytest.fixture
def record(tmp_path, store) -> dict:
    """Of an image in the store and in the builder's storage."""
    return pack_sqsh(make_image(tmp_path / "one", "one"), store, COMMIT)


@pytest.fixture
def registry(tmp_path):
    with serving(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def pushed(record, store, registry) -> Reference:
    return push_image(record, f"{registry.host}/me/cpu", store)


def test_push_and_pull_give_the_same_squashfs_and_record(
    record, store, elsewhere, registry, post_training
):
    name = f"{registry.host}/me/cpu"
    done = post_training("image", "push", "cpu", name, "--store", store.folder)
    assert done.returncode == 0, done.stderr
    reference = done.stdout.strip()
    digest = parse_reference(reference).digest
    kept = store.find("cpu")
    assert kept["registries"] == {name: digest}
    # By the registry itself, not by what we wrote.
    raw = registry.blob(digest).read_bytes()
    assert json.loads(raw)["config"]["digest"] == record["oci_digest"]

    done = post_training("image", "pull", reference, "--store", elsewhere.folder)
    assert done.returncode == 0, done.stderr
    found = elsewhere.find(record["oci_digest"])
    assert done.stdout.strip() == str(elsewhere.image_path(found["sqsh_sha256"]))
    assert elsewhere.verify(found)[0].status == "ok"
    ignored = ("pushed", "seal")
    assert {k: v for k, v in found.items() if k not in ignored} == {
        k: v for k, v in kept.items() if k not in ignored
    }
    assert found["checkout"] == COMMIT
    # The builder keeps no second copy.
    assert not any("pulled" in tag for tag in builder.stored_tags())
    again = post_training("image", "pull", reference, "--store", elsewhere.folder)
    assert again.returncode == 0
    assert len(elsewhere.records()) == 1


def test_a_moved_tag_changes_nothing(record, store, elsewhere, registry, pushed, tmp_path):
    other = pack_sqsh(make_image(tmp_path / "two", "two"), store, COMMIT)
    moved = push_image(other, pushed.name, store)
    tag = f"1.2.3-{record['oci_digest'][7:23]}"
    run_tool(
        ["skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false",
         f"docker://{moved}", f"docker://{pushed.name}:{tag}"]
    )  # fmt: skip
    found = pull_image(pushed, elsewhere)
    assert found["oci_digest"] == record["oci_digest"] != other["oci_digest"]


def test_pull_of_changed_content_is_refused_and_leaves_nothing(
    record, elsewhere, registry, pushed, post_training
):
    """A layer, the config and the manifest, each with other bytes under the same name."""
    manifest = json.loads(registry.blob(pushed.digest).read_bytes())
    changed = [manifest["layers"][0]["digest"], manifest["config"]["digest"], pushed.digest]
    forget_images()
    for digest in changed:
        path = registry.blob(digest)
        content = path.read_bytes()
        # JSON stays JSON: one letter is another.
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        done = post_training("image", "pull", str(pushed), "--store", elsewhere.folder)
        assert done.returncode == 1, digest
        assert "its content is not what its digest says" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert not list(elsewhere.folder.glob("*.sqsh"))
        path.write_bytes(content)
    assert pull_image(pushed, elsewhere)["oci_digest"] == record["oci_digest"]


def test_pulls_of_one_image_at_once_do_not_disturb_each_other(
    elsewhere, pushed, record, cli: Path, tmp_path
):
    """Each has a tag of its own in the builder's storage; the tag of a killed pull goes."""
    forget_images()
    killed = tag_of_a_killed_pull(elsewhere, tmp_path)
    folders = [elsewhere.folder, elsewhere.folder, tmp_path / "third"]
    pulls = [
        subprocess.Popen(
            [cli, "image", "pull", str(pushed), "--store", folder],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for folder in folders
    ]  # fmt: skip
    for pull, folder in zip(pulls, folders, strict=True):
        out, err = pull.communicate()
        assert pull.returncode == 0, err
        assert out.strip() == str(ImageStore(folder).image_path(record["sqsh_sha256"]))
    assert killed not in builder.stored_tags()
    assert not any("pulled" in tag for tag in builder.stored_tags())


def tag_of_a_killed_pull(store: ImageStore, folder: Path) -> str:
    """What a pull leaves that is killed: its tag, and its work folder without a lock."""
    with store.work_folder() as work:
        tag = pull_tag(store, work)
    image = make_image(folder / "killed", "killed")
    run_tool(["buildah", "tag", image.tag, tag])
    builder.remove(image.tag)
    assert tag in builder.stored_tags()
    return tag


def test_pull_of_another_image_than_wanted_is_refused(elsewhere, pushed):
    with pytest.raises(PostTrainingError, match="it is another image: its config is sha256:"):
        pull_image(pushed, elsewhere, "sha256:" + "0" * 64)


@pytest.mark.long
def test_pull_record_of_another_image_is_refused(store, elsewhere, pushed, registry, tmp_path):
    """Tags can be moved: that of the record too."""
    record = pack_sqsh(make_image(tmp_path / "two", "two"), store, COMMIT)
    other = push_image(record, pushed.name, store)
    source, target = (
        f"docker://{each.name}:sha256-{each.digest[7:]}.record" for each in (other, pushed)
    )
    run_tool(
        ["skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false", source, target]
    )
    with pytest.raises(PostTrainingError, match="is not that of the image: input_hash, oci_digest"):
        pull_image(pushed, elsewhere)
    assert elsewhere.records() == []


@pytest.mark.long
def test_pull_without_a_record_has_no_commit(record, elsewhere, registry, pushed, capsys):
    tag = f"docker://{pushed.name}:sha256-{pushed.digest[7:]}.record"
    run_tool(["skopeo", "delete", "--tls-verify=false", tag])
    found = pull_image(pushed, elsewhere)
    assert (found["oci_digest"], found["checkout"]) == (record["oci_digest"], None)
    assert found["sqsh_sha256"] == record["sqsh_sha256"]
    assert "no record beside it" in capsys.readouterr().err


@pytest.mark.long
def test_pull_of_an_image_that_is_not_ours_is_refused(elsewhere, registry, tmp_path):
    image = make_image(tmp_path / "foreign", "foreign", is_ours=False)
    name = f"{registry.host}/me/foreign"
    run_tool(
        ["skopeo", "copy", "--dest-tls-verify=false", f"--digestfile={tmp_path}/digest",
         f"containers-storage:{image.tag}", f"docker://{name}:1"]
    )  # fmt: skip
    reference = Reference(name, (tmp_path / "digest").read_text().strip())
    with pytest.raises(PostTrainingError, match="not an image of this project"):
        pull_image(reference, elsewhere)
    assert elsewhere.records() == []


@pytest.mark.long
def test_push_of_an_image_that_only_a_registry_has_copies_it_with_its_digest(
    record, store, registry, pushed
):
    forget_images()
    with store.lock():
        bare = store.add({k: v for k, v in record.items() if k != "registries"})
    with pytest.raises(UsageError, match="is in the store as a squashfs only"):
        push_image(bare, f"{registry.host}/you/cpu", store)
    with store.lock():
        store.add({**bare, "registries": {pushed.name: pushed.digest}})
    moved = push_image(store.find("cpu"), f"{registry.host}/you/cpu", store)
    assert moved.digest == pushed.digest
    assert set(store.find("cpu")["registries"]) == {pushed.name, moved.name}


def test_registry_with_a_password_takes_skopeos_own_login(
    record, store, elsewhere, tmp_path, post_training
):
    with serving(tmp_path / "locked", PASSWORD_HASH) as registry:
        words = ("image", "push", "cpu", f"{registry.host}/me/cpu", "--store", store.folder)
        files = tmp_path / "auth.json", tmp_path / "wrong.json"
        for path, password in zip(files, (PASSWORD, "another"), strict=True):
            login = base64.b64encode(f"{USER}:{password}".encode()).decode()
            path.write_text(json.dumps({"auths": {registry.host: {"auth": login}}}))
        for variables in ({}, {"REGISTRY_AUTH_FILE": str(files[1])}):
            done = post_training(*words, **variables)
            assert done.returncode == 1
            assert "asks for a password, or refuses the one it got" in done.stderr
            assert f"hint: skopeo login {registry.host}" in done.stderr
            assert PASSWORD not in done.stderr
        assert "registries" not in store.find("cpu")
        done = post_training(*words, REGISTRY_AUTH_FILE=str(files[0]))
        assert done.returncode == 0, done.stderr
        reference = done.stdout.strip()
        pull = ("image", "pull", reference, "--store", elsewhere.folder)
        assert post_training(*pull).returncode == 1
        assert post_training(*pull, REGISTRY_AUTH_FILE=str(files[0])).returncode == 0


def test_image_that_is_in_no_store_is_pulled_from_where_its_record_says(
    record, elsewhere, registry, pushed, tmp_path
):
    (tmp_path / "containers").mkdir()
    options = Options(store=elsewhere.folder, repository=tmp_path)
    told = {**record, "registries": {"127.0.0.1:9/gone/cpu": pushed.digest}}
    with pytest.raises(PostTrainingError, match="the image cannot be pulled, and there is no com"):
        fetch_image(told, options)
    told["registries"][pushed.name] = pushed.digest
    found = fetch_image(told, options)
    assert found.record["oci_digest"] == record["oci_digest"]
    assert found.squashfs.exists()


def test_a_registry_that_does_not_answer_is_one_clear_line(record, store, post_training):
    done = post_training("image", "push", "cpu", "127.0.0.1:9/me/cpu", "--store", store.folder)
    assert done.returncode == 1
    assert done.stderr.endswith("error: 127.0.0.1:9/me/cpu: the registry does not answer\n")
    assert "registries" not in store.find("cpu")


@pytest.mark.long
def test_sealed_record_in_the_registry_is_that_of_the_store(store, registry, pushed, tmp_path):
    subprocess.run(
        ["skopeo", "copy", "--src-tls-verify=false",
         f"docker://{pushed.name}:sha256-{pushed.digest[7:]}.record", f"dir:{tmp_path}/record"],
        check=True,
    )  # fmt: skip
    manifest = json.loads((tmp_path / "record/manifest.json").read_text())
    assert manifest["subject"]["digest"] == pushed.digest
    assert manifest["subject"]["size"] == registry.blob(pushed.digest).stat().st_size
    [layer] = manifest["layers"]
    told = json.loads((tmp_path / "record" / layer["digest"][7:]).read_text())
    assert told == store.find("cpu")
    assert told["seal"] == seal(told)
