"""`image lock` where podman is the only program that reads registries, as on Alps."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.registry import serving
from post_training.images.registry import lock_registry_base, read_registry_base

pytestmark = pytest.mark.image


@pytest.fixture
def image(tmp_path):
    """NAME:TAG in a registry: an image for two platforms, of a file each."""
    with serving(tmp_path / "registry") as registry:
        name = f"{registry.host}/toy/base"
        run(["buildah", "manifest", "create", f"{name}:1"])
        try:
            for architecture in ("amd64", "arm64"):
                folder = tmp_path / architecture
                folder.mkdir()
                (folder / "word").write_text(architecture)
                (folder / "Dockerfile").write_text("FROM scratch\nCOPY word /\n")
                run(["buildah", "bud", "--quiet", f"--platform=linux/{architecture}",
                     f"--manifest={name}:1", folder])  # fmt: skip
            run(["buildah", "manifest", "push", "--all", "--tls-verify=false", f"{name}:1",
                 f"docker://{name}:1"])  # fmt: skip
        finally:
            run(["buildah", "manifest", "rm", f"{name}:1"])
        yield f"{name}:1"
    stored = run(["podman", "images", "--quiet", f"--filter=reference={name}"]).split()
    subprocess.run(["podman", "rmi", "--force", *set(stored)], capture_output=True)


def run(words: list[str | Path]) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def podman_alone(tmp_path, monkeypatch):
    """podman, and a registry that it may talk to without TLS; no skopeo."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/podman").symlink_to(shutil.which("podman"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "registries.conf").write_text(
        '[[registry]]\nlocation = "127.0.0.1"\ninsecure = true\n'
    )
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "registries.conf"))


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_lock_base_by_podman_pins_the_platforms_image(architecture, image, podman_alone, tmp_path):
    path, platform = tmp_path / "base.lock", f"linux/{architecture}"
    assert lock_registry_base(path, image, platform, None) is None
    lock = json.loads(path.read_text())
    reference = read_registry_base(path, image, platform)
    # Asked of the registry itself, by skopeo: the image of this digest is that of the platform.
    raw = subprocess.run(
        ["/usr/bin/skopeo", "inspect", "--tls-verify=false", "--config", f"docker://{reference}",
         f"--override-arch={architecture}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert raw.returncode == 0, raw.stderr
    assert json.loads(raw.stdout)["architecture"] == architecture
    assert lock["config_digest"].startswith("sha256:")


def test_lock_base_with_neither_program_says_both(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = lock_registry_base(tmp_path / "base.lock", "registry.example/a:1", "linux/arm64", None)
    assert "neither skopeo nor podman is installed" in reason
