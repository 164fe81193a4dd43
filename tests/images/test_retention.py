"""`post-training image gc` on small images of this test's own: what is named stays."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from post_training.core.hashing import sha256_file
from post_training.core.process import run_tool
from post_training.images import builder
from post_training.images.release import add_release, read_releases, release_entry
from post_training.images.store import RECORD_SCHEMA, ImageStore

# Root without the right to read what is closed to it.
WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def add_image(store: ImageStore, number: int, name: str = "cpu") -> dict:
    """Image `number` of `name`; a higher number was pushed later."""
    record = {
        "schema": RECORD_SCHEMA,
        "name": name,
        "version": "0.1.0",
        "platform": "linux/amd64",
        "input_hash": f"{number:x}" * 64,
        "oci_digest": f"sha256:{number:02x}" + "0c" * 31,
        "sqsh_sha256": f"{number:02x}" + "05" * 31,
        "base_sha256": f"{number:02x}" + "ba" * 31,
        "lock_sha256": {},
        "checkout": {"commit": "c" * 40, "dirty": False},
        "size_bytes": 4,
        "pushed": f"2026-01-{number:02d}T00:00:00+00:00",
    }
    with store.lock():
        store.image_path(record["sqsh_sha256"]).write_text("hsqs")
        (store.folder / "bases").mkdir(exist_ok=True)
        (store.folder / f"bases/sha256-{record['base_sha256']}.tar").write_text("base")
        store.add(record)
    return record


@pytest.fixture
def store(tmp_path) -> ImageStore:
    """Four images of `cpu` and one of `other`, each with a base of its own."""
    store = ImageStore(tmp_path / "store")
    for number in (1, 2, 3, 4):
        add_image(store, number)
    add_image(store, 5, "other")
    return store


@pytest.fixture
def gc(store, storage, cli, tmp_path):
    """Run `image gc` with a checkout and an EDF folder that are empty at first.

    through: a command that starts it."""
    for name in ("checkout/containers", "edf", "runs"):
        (tmp_path / name).mkdir(parents=True)

    def run(*words, through=()):
        return subprocess.run(
            [*through, cli, "image", "gc", *words, "--store", store.folder,
             "--repository", tmp_path / "checkout"],
            env={**os.environ, "EDF_PATH": str(tmp_path / "edf")},
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip

    return run


def kept(store: ImageStore) -> set[str]:
    """The numbers of the images that are whole."""
    there = {path.stem for path in store.folder.glob("*.sqsh")}
    assert there == {path.stem for path in store.folder.glob("sha256-*.json")}
    assert {f"sha256-{entry['sqsh_sha256']}" for entry in store.index()} == there
    return {stem.removeprefix("sha256-")[1] for stem in there}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_gc_removes_only_what_nothing_names_and_only_with_delete(store, gc, tmp_path):
    done = gc(tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert [line.rsplit("  ")[-1] for line in done.stdout.splitlines()] == [
        "kept: the newest of other", "kept: the newest of cpu", "can go", "can go", "can go"
    ]  # fmt: skip
    assert kept(store) == {"1", "2", "3", "4", "5"}
    assert gc("--delete").returncode == 0  # The folder is remembered.
    assert kept(store) == {"4", "5"}
    assert {record["version"] for record in store.removed_records()} == {"0.1.0"}
    # Their bases stay: with the records, they are what the images can be built from again.
    assert len(list((store.folder / "bases").iterdir())) == 5
    assert store.find_recorded("0105050505")["sqsh_sha256"].startswith("01")


def test_gc_as_json_says_what_stays_for_what_and_what_can_go(store, gc, tmp_path):
    write(store.folder / ".push-x/image.sqsh", "x")
    done = gc(tmp_path / "runs", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(each["oci_digest"][7:9], each["kept_for"]) for each in found["images"]] == [
        ("05", "the newest of other"), ("04", "the newest of cpu"),
        ("03", None), ("02", None), ("01", None),
    ]  # fmt: skip
    assert found["files"] == [str(store.folder / ".push-x")]
    assert (found["built"], found["dangling"], found["is_removed"]) == ([], [], False)
    assert json.loads(gc("--json", "--delete").stdout)["is_removed"] is True
    assert kept(store) == {"4", "5"}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("runs/a/b/run.json", "oci_digest"),
        ("runs/a/run.json", "sqsh_sha256"),
        ("runs/model/artifact.json", "sqsh_sha256"),
        ("runs/queued/slurm/environment.toml", "sqsh_sha256"),
        ("runs/queued/slurm/job.sh", "oci_digest"),
        ("edf/mine.toml", "sqsh_sha256"),
        ("checkout/edf/post-training.toml", "sqsh_sha256"),
    ],
)
def test_gc_keeps_what_a_run_or_an_edf_names(store, gc, tmp_path, name, key):
    digest = store.find("0205050505")[key]
    write(tmp_path / name, f'{{"image": "/x/sha256-{digest.removeprefix("sha256:")}.sqsh"}}')
    done = gc(tmp_path / "runs", "--delete")
    assert str(tmp_path / name) in done.stdout
    assert kept(store) == {"2", "4", "5"}


def test_gc_keeps_what_a_run_behind_links_names(store, gc, tmp_path):
    """`storage setup` links folders of runs to where they lie."""
    digest = store.find("0205050505")["sqsh_sha256"]
    write(tmp_path / "scratch/a/run.json", f'"{digest}"')
    (tmp_path / "scratch/ring").symlink_to(tmp_path / "scratch")
    (tmp_path / "runs/private").symlink_to(tmp_path / "scratch")
    (tmp_path / "runs/itself").symlink_to(tmp_path / "runs/itself")
    done = gc(tmp_path / "runs", "--delete")
    assert done.returncode == 0, done.stderr
    assert kept(store) == {"2", "4", "5"}


def test_gc_with_links_to_nothing_names_them_and_goes_on(store, gc, tmp_path):
    """`make clean` leaves one in ~/.edf."""
    links = [tmp_path / "edf/post-training.toml", tmp_path / "runs/run.json"]
    for link in links:
        link.symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "edf/pipe.toml")
    done = gc(tmp_path / "runs", "--delete")
    assert done.returncode == 0
    for link in links:
        assert f"warning: {link}: a link to nothing; no image is kept for it" in done.stderr
    assert kept(store) == {"4", "5"}


@pytest.mark.parametrize(
    ("place", "hint"),
    [
        ("edf", "it may pin an image"),
        ("edf/mine.toml", "it may pin an image"),
        ("runs/a/b", "its runs may name images"),
        ("runs/a/run.json", "its runs may name images"),
    ],
)
def test_gc_with_what_cannot_be_read_removes_nothing(store, gc, tmp_path, place, hint):
    path = tmp_path / place
    if path.suffix:
        write(path, "")
    else:
        path.mkdir(parents=True, exist_ok=True)
    path.chmod(0)
    done = gc(tmp_path / "runs", "--delete", through=WITHOUT_RIGHTS if os.geteuid() == 0 else ())
    path.chmod(0o700)
    assert done.returncode == 1
    assert f"error: {path}: cannot be read: permission denied\nhint: {hint}" in done.stderr
    assert len(kept(store)) == 5


def test_gc_twice_keeps_the_bases_of_removed_images_and_what_is_used_instead(store, gc, tmp_path):
    instead = store.folder / f"bases/instead-of-{'d' * 64}.json"
    write(instead, "{}")
    for _ in range(2):
        assert gc(tmp_path / "runs", "--delete").returncode == 0
    bases = {f"sha256-{record['base_sha256']}.tar" for record in store.removed_records()}
    assert len(bases) == 3
    assert {path.name for path in instead.parent.iterdir()} >= {*bases, instead.name}


def test_gc_keeps_releases(store, gc, tmp_path):
    add_release(tmp_path / "checkout", release_entry(store.find("0105050505"), "by hand", "now"))
    gc(tmp_path / "runs", "--delete")
    assert kept(store) == {"1", "4", "5"}
    [entry] = read_releases(tmp_path / "checkout")
    assert entry["commit"] == "c" * 40


def test_gc_without_any_run_folder_is_refused(store, gc):
    done = gc("--delete")
    assert done.returncode == 2
    assert "no folder is known in which runs are kept" in done.stderr
    assert len(kept(store)) == 5


def test_gc_outside_a_checkout_is_refused(store, gc, tmp_path):
    (tmp_path / "checkout/containers").rmdir()
    done = gc(tmp_path / "runs", "--delete")
    assert done.returncode == 2
    assert f"error: {tmp_path / 'checkout'}: not a checkout of post-training\n" in done.stderr
    assert len(kept(store)) == 5


def test_gc_run_folder_that_is_gone_is_refused_until_forgotten(store, gc, tmp_path):
    other = tmp_path / "scratch"
    other.mkdir()
    assert gc(tmp_path / "runs", other).returncode == 0
    other.rmdir()
    done = gc("--delete")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {other}: cannot be read")
    assert len(kept(store)) == 5
    assert gc("--forget", other, "--delete").returncode == 0
    assert kept(store) == {"4", "5"}


def test_gc_removes_leftovers_and_bases_of_no_image(store, gc, tmp_path):
    leftovers = ["sha256-" + "e" * 64 + ".sqsh", ".push-x/image.sqsh", ".build-x/context/file"]
    leftovers += ["bases/sha256-" + "f" * 64 + ".tar"]
    for name in leftovers:
        write(store.folder / name, "x")
    locked = "bases/sha256-" + "d" * 64 + ".tar"
    write(store.folder / locked, "x")
    lock = {"schema": "post-training/base-lock/1", "sha256": "d" * 64}
    write(tmp_path / "checkout/containers/cpu/base.lock", json.dumps(lock))
    gc(tmp_path / "runs", "--delete")
    assert not any((store.folder / name).exists() for name in leftovers)
    assert (store.folder / locked).exists()


def test_gc_keeps_a_distributions_packages_that_a_record_or_a_lock_names(store, gc, tmp_path):
    """Their mirror keeps only the newest: without them `rebuild` could not make the image again."""
    system_lock = tmp_path / "checkout/containers/gh200/system.lock"
    write(system_lock, "{}")
    with store.lock():
        store.add({**store.find("0105050505"), "lock_sha256": {"system.lock": "a" * 64}})
    folders = {store.folder / "system" / name for name in ("a" * 64, sha256_file(system_lock))}
    others = {store.folder / "system" / name for name in ("b" * 64, ".killed.tmp")}
    for folder in folders | others:
        write(folder / "patch_2.7_arm64.deb", "x")
    done = gc(tmp_path / "runs", "--delete")
    assert f"system/{'b' * 64}  removed" in done.stdout
    assert {record["sqsh_sha256"][:2] for record in store.removed_records()} >= {"01"}
    assert set((store.folder / "system").iterdir()) == folders


def test_gc_removes_from_the_builders_storage_what_the_store_has(store, gc, tmp_path):
    tags = {}
    for number, name in ((1, "cpu"), (3, "cpu"), (4, "cpu"), (5, "other"), (9, "cpu")):
        tag = f"localhost/post-training/{name}:0.1.0-{number}"
        context = tmp_path / f"context-{number}"
        write(context / "Dockerfile", "FROM scratch\nCOPY shared /\nCOPY own /\n")
        write(context / "shared", "shared")
        write(context / "own", str(number))
        builder.build(["--quiet", "--network=none", "--layers=true", f"--tag={tag}", context])
        tags[number] = tag
    digests = builder.stored_tags()
    assert digests == {tag: builder.stored_image(tag).oci_digest for tag in tags.values()}
    with store.lock():
        for number in (1, 3, 4, 5):
            record = store.find(f"0{number}05050505")
            store.add({**record, "oci_digest": digests[tags[number]]})
    # Named, so that the image stays; its copy in the builder's storage is no more than a copy.
    write(tmp_path / "runs/a/run.json", f'"{digests[tags[3]].removeprefix("sha256:")}"')
    done = gc(tmp_path / "runs")
    assert [line for line in done.stdout.splitlines() if line.startswith("localhost/")] == [
        f"{tags[1]}  can go", f"{tags[3]}  can go",
    ]  # fmt: skip
    assert builder.stored_tags() == digests
    assert gc("--delete").returncode == 0
    assert set(builder.stored_tags()) == {tags[4], tags[5], tags[9]}
    assert kept(store) == {"3", "4", "5"}
    # The layers that were theirs alone are gone too; the one that all share stays.
    assert len(json.loads(run_tool(["buildah", "images", "--all", "--json"]))) == 4


def test_gc_removes_the_work_of_a_killed_rebuild_and_not_of_a_live_one(store, gc, tmp_path):
    write(store.folder / ".work-killed/.live", "")
    with store.work_folder() as live:
        gc(tmp_path / "runs", "--delete")
        assert {path.name for path in store.folder.glob(".work-*")} == {live.name}
    assert not list(store.folder.glob(".work-*"))


def test_show_of_a_removed_image_says_how_to_have_it_again(store, gc, post_training, tmp_path):
    gc(tmp_path / "runs", "--delete")
    done = post_training("image", "show", "0105050505", "--store", store.folder)
    assert done.returncode == 2
    assert "`post-training image rebuild 0105050505` builds it" in done.stderr
    with store.lock():  # Pushed again, it is no removed one.
        [record] = [r for r in store.removed_records() if r["sqsh_sha256"].startswith("01")]
        store.image_path(record["sqsh_sha256"]).write_text("hsqs")
        store.add(record)
    assert store.find("0105050505") == record
    assert len(store.removed_records()) == 2
