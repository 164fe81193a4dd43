"""storage setup, promote and doctor, on a site of the test's own."""

import json
import os
import shutil
import stat
import time

import pytest

from post_training.cli.machines import list_endangered
from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import atomic_directory, write_atomic
from post_training.core.hashing import sha256_text
from post_training.images.store import ImageStore
from post_training.records.artifact import seal_artifact
from post_training.records.promote import promote, promoted_copy
from post_training.records.run import RunFolder
from post_training.slurm import storage
from post_training.slurm.site import SITES_DIR, load_site

SITE = """
extends: {base}
storage:
  scratch: {folder}/scratch/${{STORAGE_TEST_USER}}
  permanent: {folder}/permanent
  deleted_after_days: 30
"""


RECORD = {
    "run_id": "x",
    "stage": "mix",
    "recipe": {},
    "recipe_hash": "1",
    "inputs": {},
    "image": None,
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, at a site `here`."""
    (tmp_path / "sites").mkdir()
    base = SITES_DIR / "laptop.yaml"
    (tmp_path / "sites/here.yaml").write_text(SITE.format(base=base, folder=tmp_path))
    monkeypatch.setenv("STORAGE_TEST_USER", "someone")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def setup(place) -> None:
    storage.setup("here", load_site("here", {}, place / "sites"), None)


def doctor(place, folder, margin_days: int, *, as_json: bool) -> int:
    here = load_site("here", {}, place / "sites")
    after_days = here.storage.deleted_after_days
    return list_endangered(folder, "here", after_days, margin_days, as_json=as_json)


@pytest.fixture
def model(place):
    folder = place / "work/runs/one/model"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/weights").write_bytes(b"12")
    (folder / "config.json").write_text("{}")
    seal_artifact(folder, "model", RECORD)
    setup(place)
    return folder


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_setup_makes_folders_and_links_and_twice_is_the_same(place):
    setup(place)
    setup(place)
    links = place / "work/artifacts"
    assert os.readlink(links / "private") == f"{place}/scratch/someone/post-training"
    assert os.readlink(links / "store") == f"{place}/permanent/post-training"
    assert mode(links / "private") == 0o700
    assert mode(links / "shared") == mode(links / "store") == 0o2770


# install-tools brings it; a machine set up by hand may lack it.
def test_setup_what_is_made_later_is_open_to_the_group_whatever_the_umask(place):
    setup(place)
    earlier = os.umask(0o077)
    try:
        for folder in ("scratch/someone/post-training-shared", "permanent/post-training"):
            run = RunFolder(place / folder / "run")
            run.claim()
            write_atomic(run.path / "file", "x")
            with atomic_directory(run.path / "model") as model:
                (model / "nested").mkdir()
                # As safetensors leaves it.
                os.close(os.open(model / "nested/weights", os.O_CREAT | os.O_WRONLY, 0o600))
            seal_artifact(run.path / "model", "model", RECORD)
            written = [run.path, *run.path.rglob("*")]
            assert len(written) == 7
            for path in written:
                assert mode(path) & 0o077 == (0o070 if path.is_dir() else 0o060), path
                assert path.stat().st_gid == (place / folder).stat().st_gid
    finally:
        os.umask(earlier)


def test_setup_two_users_with_one_shared_folder_have_the_same_place(place, monkeypatch):
    shared = place / "scratch/someone/ours"
    for user in ("someone", "another"):
        monkeypatch.setenv("STORAGE_TEST_USER", user)
        (place / user).mkdir()
        monkeypatch.chdir(place / user)
        storage.setup("here", load_site("here", {}, place / "sites"), None, shared, "daemon")
        assert (place / user / "artifacts/shared").resolve() == shared
    assert (place / "another/artifacts/private").resolve() != (
        place / "someone/artifacts/private"
    ).resolve()


def test_setup_of_another_persons_folder_leaves_its_rights_and_asks_for_them(place, monkeypatch):
    shared = place / "theirs"
    shared.mkdir(mode=0o750)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="and you may not write there"):
        storage.setup("here", load_site("here", {}, place / "sites"), None, shared)
    assert mode(shared) == 0o750


def test_setup_without_setfacl_says_what_that_means(place, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(place))
    setup(place)
    assert "setfacl is not installed" in capsys.readouterr().err


def test_setup_of_a_link_that_leads_elsewhere_is_refused_and_makes_nothing(place):
    (place / "work/artifacts").mkdir()
    (place / "work/artifacts/store").symlink_to("/elsewhere")
    with pytest.raises(UsageError, match="there already, and not a link to"):
        setup(place)
    assert not (place / "scratch").exists()


def test_setup_without_the_users_variable_names_it(place, monkeypatch):
    monkeypatch.delenv("STORAGE_TEST_USER")
    with pytest.raises(UsageError, match="STORAGE_TEST_USER is not set"):
        setup(place)


def test_promote_copies_all_files_and_leaves_a_pointer(place, model):
    (model / "deep/weights").chmod(0o600)
    made = promote(model, None)
    fingerprint = json.loads((model / "artifact.json").read_text())["fingerprint"]
    copy = place / f"permanent/post-training/one-model-{fingerprint[:12]}"
    assert (copy / "deep/weights").read_bytes() == b"12"
    # As of any file that is made there.
    (copy.parent / "another").touch()
    assert mode(copy / "deep/weights") == mode(copy.parent / "another")
    assert made == copy
    pointer = json.loads((model.parent / "model.promoted.json").read_text())
    assert (pointer["path"], pointer["fingerprint"]) == (str(copy), fingerprint)
    promote(model, None)  # Again: found, and compared.


def test_promoted_copy_is_found_by_what_is_left_of_the_artifact(model, tmp_path):
    path = model.resolve()
    assert promoted_copy(path / "deep/weights") is None
    promote(model, "kept")
    shutil.rmtree(model)
    copy = tmp_path / "permanent/post-training/kept"
    assert promoted_copy(path) == copy
    assert promoted_copy(path / "deep/weights") == copy / "deep/weights"
    assert promoted_copy(path.parent) is None
    (path.parent / "model.promoted.json").write_text('{"schema": "another/1"}')
    with pytest.raises(UsageError, match=r"model\.promoted\.json: schema is 'another/1'"):
        promoted_copy(path)


def test_promote_changed_artifact_is_refused_and_copies_nothing(place, model):
    (model / "deep/weights").write_bytes(b"21")
    with pytest.raises(PostTrainingError, match="changed since it was made: deep/weights"):
        promote(model, None)
    assert list((place / "permanent/post-training").iterdir()) == []


def test_promote_finds_a_damaged_copy(place, model):
    promote(model, "kept")
    (place / "permanent/post-training/kept/deep/weights").write_bytes(b"??")
    with pytest.raises(PostTrainingError, match="the copy that is there was changed"):
        promote(model, "kept")


def test_promote_to_the_name_of_another_is_refused(place, model):
    promote(model, "kept")
    other = place / "work/other"
    other.mkdir()
    (other / "x").touch()
    seal_artifact(other, "model", RECORD)
    with pytest.raises(UsageError, match="another artifact is there"):
        promote(other, "kept")


def test_doctor_lists_what_is_about_to_be_deleted_by_its_last_use(place, capsys):
    folder = place / "work"
    for name, read, written in (("old", 29, 29), ("read", 1, 40), ("new", 0, 0), ("due", 22, 25)):
        (folder / name).mkdir()
        (folder / name / "file").write_text("12345")
        now = time.time()
        os.utime(folder / name / "file", (now - read * 86400, now - written * 86400))
    assert doctor(place, folder, 7, as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert [entry["folder"] for entry in found] == [str(folder / "old")]
    assert (found[0]["num_files"], found[0]["size_bytes"], found[0]["days_left"]) == (1, 5, 1.0)
    assert doctor(place, folder, 9, as_json=False) == 1
    assert "hint: here deletes what is unused for 30 days" in capsys.readouterr().err
    assert doctor(place, folder / "read", 7, as_json=False) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"{folder / 'read'}: nothing that here deletes in 7 days\n"


def test_doctor_where_nothing_is_deleted_says_so(place, capsys):
    (place / "sites/here.yaml").write_text(f"extends: {SITES_DIR}/laptop.yaml\n")
    assert doctor(place, place, 7, as_json=False) == 0
    assert "nothing is known to be deleted there" in capsys.readouterr().err
    assert doctor(place, place, 7, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_image_is_copied_to_another_store_and_checked(tmp_path):
    own, kept = ImageStore(tmp_path / "own"), ImageStore(tmp_path / "permanent/images")
    digest = sha256_text("an image")
    own.folder.mkdir()
    own.image_path(digest).write_text("an image")
    record = own.add(
        {
            "schema": "post-training/image-record/1",
            "name": "cpu",
            "version": "1",
            "input_hash": "1" * 64,
            "oci_digest": "sha256:" + "2" * 64,
            "sqsh_sha256": digest,
            "size_bytes": 8,
            "pushed": "2026-01-01T00:00:00+00:00",
        }
    )
    assert kept.copy_from(own, record) == record
    assert [found.status for found in kept.verify(kept.find("cpu"))] == ["ok"]
    kept.image_path(digest).unlink()
    own.image_path(digest).write_text("another!")
    with pytest.raises(PostTrainingError, match="damaged: its sha256 is"):
        kept.copy_from(own, record)
    assert not kept.image_path(digest).exists()
