"""buildah and podman, the real ones, on a recipe of one file."""

import os
import shutil

import pytest

from post_training.core.process import run_tool
from post_training.images import builder
from post_training.images.recipe import SOURCE_DATE_EPOCH

pytestmark = pytest.mark.image
TAG = "localhost/post-training/builder-test:1"


@pytest.fixture
def only(tmp_path, monkeypatch):
    """only("podman"): from then on this builder alone is to be found."""
    used = []

    def choose(name: str) -> None:
        folder = tmp_path / f"only-{name}"
        folder.mkdir()
        for needed in ("runc", "newuidmap", "newgidmap", "fuse-overlayfs", "conmon", name):
            if found := shutil.which(needed, path=os.defpath + ":/usr/sbin:/sbin"):
                (folder / needed).symlink_to(found)
        monkeypatch.setenv("PATH", str(folder))
        used.append(name)

    yield choose
    run_tool([used[-1], "rmi", "--force", TAG])


@pytest.mark.skipif(not shutil.which("podman"), reason="podman is not installed")
def test_buildah_and_podman_build_inspect_and_mount_the_same_image(only, tmp_path):
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(
        "FROM scratch\nCOPY word /etc/word\nENV WORD=one\nLABEL org.test.word=two\n"
    )
    (context / "word").write_text("three")
    (context / "word").chmod(0o644)
    options = ["--network=none", "--format=oci", "--layers=true", "--identity-label=false",
               f"--timestamp={SOURCE_DATE_EPOCH}", "--platform=linux/amd64"]  # fmt: skip
    digests = set()
    for name in ("buildah", "podman"):
        only(name)
        assert builder.program() == name
        assert builder.stored_image(TAG) is None
        builder.build([*options, f"--tag={TAG}", context])
        stored = builder.stored_image(TAG)
        assert stored.labels == {"org.test.word": "two"}
        assert stored.environment["WORD"] == "one"
        with builder.mounted(TAG, "post-training-test") as root:
            assert (root / "etc/word").read_text() == "three"
        assert list(builder.version()) == [name]
        digests.add(stored.oci_digest)
        for _ in range(2):  # the second time it is gone: another process can be faster
            builder.remove(TAG)
        assert builder.stored_image(TAG) is None
    assert len(digests) == 1


def test_buildah_mounts_again_what_a_killed_process_left(only, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /word\n")
    only("buildah")
    builder.build(["--network=none", f"--tag={TAG}", tmp_path])
    name = f"post-training-test-{os.getpid()}"
    run_tool(["buildah", "from", "--pull-never", f"--name={name}", TAG])
    with builder.mounted(TAG, name) as root:
        assert (root / "word").exists()
    listed = run_tool(["buildah", "containers", "--format", "{{.ContainerName}}"])
    assert name not in listed.split()
