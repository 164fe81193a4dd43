"""The rocm Dockerfile really builds, on a Debian base that stands in for LUMI's.

The base has what LUMI's has where the Dockerfile looks: /opt/venv. Locks are small.

Whoever builds has secrets where builders look: none may be in what comes of it.
"""

import json
import os
import platform
import re
import secrets
import shutil
import subprocess
from pathlib import Path

import pytest

from post_training.core.process import run_tool
from post_training.images import builder
from post_training.images.base import SUITE
from post_training.images.build import build_image
from post_training.images.lock import lock_recipe
from post_training.images.push import push_sqsh
from post_training.images.recipe import load_recipe
from post_training.images.store import ImageStore

pytestmark = [pytest.mark.long, pytest.mark.image]
REPOSITORY = Path(__file__).parents[2]
ASKED = ["pydantic==2.14.3", "PyYAML==6.0.3", "rich==15.0.0", "typer==0.29.2"]
NATIVE = "linux/arm64" if platform.machine() == "aarch64" else "linux/amd64"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(NAME, where skopeo finds it) of the stand-in, in the builder's storage and an OCI folder."""
    folder = tmp_path_factory.mktemp("base")
    run_tool(
        ["mmdebstrap", "--quiet", "--variant=minbase",
         "--include=python3,python3-venv,ca-certificates", SUITE, folder / "base.tar"]
    )  # fmt: skip
    (folder / "Dockerfile").write_text(
        "FROM scratch\nADD base.tar /\nENV OF_THE_BASE='kept in the image'\n"
        "RUN python3 -m venv /opt/venv\n"
    )
    name = "localhost/post-training/stand-in"
    builder.build(["--network=none", "--format=oci", f"--tag={name}:1", folder])
    layout = folder / "layout"
    run_tool(["buildah", "push", f"{name}:1", f"oci:{layout}:1"])
    # As pulled from a registry: found by the digest of its compressed layers' manifest.
    run_tool(["buildah", "rmi", "--force", f"{name}:1"])
    run_tool(["skopeo", "copy", f"oci:{layout}:1", f"containers-storage:{name}:1"])
    yield name, f"oci:{layout}:1"
    run_tool(["buildah", "rmi", "--force", f"{name}:1"])


@pytest.fixture
def secret(tmp_path, monkeypatch) -> bytes:
    """Planted in the environment, the home and the checkout's own settings of who builds."""
    planted = f"planted-{secrets.token_hex(16)}"
    home = tmp_path / "home"
    credentials = home / ".config/post-training/credentials"
    credentials.mkdir(parents=True)
    for path, text in {
        home / ".netrc": f"machine pypi.org login me password {planted}\n",
        home / ".git-credentials": f"https://me:{planted}@example.org\n",
        credentials / "hf-token": planted,
    }.items():
        path.write_text(text)
        path.chmod(0o600)
    if (index := Path.home() / ".config/pip").exists():  # Where packages come from is no secret.
        (home / ".config/pip").symlink_to(index)
    monkeypatch.setenv("HOME", str(home))
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SOME_PASSWORD"):
        monkeypatch.setenv(name, planted)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    address = f"https://me:{planted}@example.org/post-training.git"
    subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", address], check=True)
    (tmp_path / "src").mkdir()
    (tmp_path / "src/.env").write_text(f"HF_TOKEN={planted}\n")
    return planted.encode()


def test_dockerfile_builds_on_a_stand_in_base_and_holds_no_secret(base, secret, tmp_path):
    base_name, layout = base
    for part in ("containers/steps", "entrypoints", "src"):
        shutil.copytree(REPOSITORY / part, tmp_path / part, dirs_exist_ok=True)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    folder = tmp_path / "containers/rocm"
    folder.mkdir(parents=True)
    shutil.copy(REPOSITORY / "containers/rocm/Dockerfile", folder)
    (folder / "recipe.toml").write_text(
        f'base = "{base_name}:1"\nplatform = "{NATIVE}"\npython = "3.11"\nglibc = "2.36"\n'
        'without = ["torch"]\n'
    )
    (folder / "requirements.in").write_text("\n".join(ASKED) + "\n")
    (folder / "dev.in").write_text("-c requirements.lock\nhatchling==1.33.0\n")
    (folder / "imports.txt").write_text("pydantic\nyaml\npost_training.cli\n")
    store = ImageStore(tmp_path / "store")
    assert lock_recipe(load_recipe("rocm", tmp_path), store, layout) == []
    recipe = load_recipe("rocm", tmp_path)
    image, is_new = build_image(recipe, store)
    try:
        assert is_new
        assert image.identity["platform"] == NATIVE
        assert image.environment["OF_THE_BASE"] == "kept in the image"
        assert "PIP_NO_INDEX" not in image.environment
        with builder.mounted(image.tag, "post-training-test") as root:
            said = (root / "etc/environment").read_text()
            assert "OF_THE_BASE=kept in the image\n" in said
            assert not re.search(r"^(PIP_|SOURCE_DATE|HOME=|\w*_proxy)", said, re.MULTILINE)
            identity = json.loads((root / "etc/post-training/image.json").read_text())
            assert identity["input_hash"] == recipe.input_hash(identity["base_sha256"])
        said = builder.run_in(image.tag, NATIVE, "entrypoint --help && post-training --help")
        assert "Run one stage of post-training." in said
        run_tool(["buildah", "push", "--disable-compression", image.tag, f"dir:{tmp_path}/layers"])
        record = push_sqsh(image, recipe, store)
        unpacked = tmp_path / "unpacked"
        run_tool(["unsquashfs", "-dest", unpacked, store.image_path(record["sqsh_sha256"])])
        places = [tmp_path / "layers", unpacked, store.record_path(record["sqsh_sha256"])]
        assert len(list((tmp_path / "layers").iterdir())) > 5
        assert _holding(secret, tmp_path / "home")  # It would be found.
        assert not [path for place in places for path in _holding(secret, place)]
    finally:
        subprocess.run(["buildah", "rmi", "--force", image.tag], env=os.environ, check=False)


def _holding(secret: bytes, place: Path) -> list[str]:
    """The files in or below `place` that hold the secret."""
    found = subprocess.run(
        ["grep", "--recursive", "--files-with-matches", "--text", "--fixed-strings", secret, place],
        capture_output=True,
        text=True,
    )
    assert found.returncode in (0, 1), found.stderr
    return found.stdout.splitlines()
