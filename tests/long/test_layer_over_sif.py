"""An image over a site's own SIF, made and run in the real Apptainer, without a builder or root's
powers in it. A small Debian with /opt/venv stands in for the site's SIF, and has no torch.

Debian has Apptainer in sid: our runner carries that, behind a program of its name.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from post_training.core.hashing import sha256_file
from post_training.images.base import SUITE
from post_training.images.identity import pair_digest
from post_training.images.push import make_squashfs, write_sif
from post_training.images.render import edf_text
from post_training.images.store import ImageStore

pytestmark = [pytest.mark.long, pytest.mark.image]
REPOSITORY = Path(__file__).parents[2]
ASKED = ["pydantic==2.14.3", "PyYAML==6.0.3", "rich==15.0.0", "typer==0.29.2"]
RECIPE = """
base = "registry.example/stand-in:1"
platform = "linux/amd64"
python = "3.11"
glibc = "2.36"
without = ["torch"]
"""
# --userns: root's powers are not what a user of the site has.
SITE = """
scheduler: {time: "01:00:00", cpus_per_task: 1, signal_s: 60}
launcher: {kind: singularity, command: apptainer, options: [--userns]}
cache_dir: /tmp
storage: {scratch: /tmp}
"""
IDENTIFY = """
import json, os
from post_training.images import inside
print(json.dumps({**inside.identify_image(os.environ), "over": inside.find_mounts_over_image(),
                  "foreign": inside.foreign_variables(os.environ),
                  "of_the_sif": os.environ["KEPT"]}))
"""


def bootstrap(folder: Path, suite: str, include: str) -> Path:
    hosts = 'echo "127.0.0.1 localhost" >"$1/etc/hosts"'
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase",
         '--aptopt=Acquire::Check-Valid-Until "false"', f"--include={include}",
         f"--customize-hook={hosts}", suite, folder / "root"],
        check=True,
    )  # fmt: skip
    return folder / "root"


@pytest.fixture(scope="module")
def site_sif(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    root = bootstrap(folder, SUITE, "python3,python3-venv")
    subprocess.run(["chroot", root, "python3", "-m", "venv", "/opt/venv"], check=True)
    (root / ".singularity.d/env").mkdir(parents=True)
    for name, text in {"90-environment.sh": "export KEPT=yes\n", "99-base.sh": ""}.items():
        (root / ".singularity.d/env" / name).write_text(text)
    make_squashfs(root, folder / "site.sqsh")
    write_sif(
        folder / "site.sqsh", folder / "site-20260807.sif",
        platform="linux/amd64", labels={}, environment={},
    )  # fmt: skip
    (folder / "latest.sif").symlink_to(folder / "site-20260807.sif")
    return folder / "latest.sif"


@pytest.fixture(scope="module")
def apptainer_root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sid")
    root = bootstrap(folder, "sid", "apptainer,squashfuse")
    make_squashfs(root, folder / "sid.sqsh")
    return folder / "sid.sqsh"


@pytest.fixture
def user(tmp_path, monkeypatch, site_sif, apptainer_root, cli) -> Path:
    """A user's folder with a checkout of a small recipe, a site of its own, and `apptainer`."""
    for part in ("containers/steps", "entrypoints", "src"):
        shutil.copytree(REPOSITORY / part, tmp_path / "checkout" / part)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path / "checkout")
    recipe = tmp_path / "checkout/containers/small"
    recipe.mkdir(parents=True)
    for name in ("Dockerfile", "layer.sh"):
        shutil.copy(REPOSITORY / "containers/rocm" / name, recipe)
    (recipe / "recipe.toml").write_text(RECIPE)
    (recipe / "requirements.in").write_text("\n".join(ASKED) + "\n")
    (recipe / "dev.in").write_text("-c requirements.lock\nhatchling==1.33.0\n")
    (recipe / "imports.txt").write_text("pydantic\nyaml\npost_training.cli\n")
    site = tmp_path / "config/post-training/sites/there"
    site.mkdir(parents=True)
    (site / "site.yaml").write_text(SITE)
    (site / "edf.toml").write_text(
        f'workdir = "{tmp_path}"\nmounts = ["{tmp_path}:{tmp_path}"]\nentrypoint = false\n'
        'writable = false\n[env]\nPOST_TRAINING_SITE = "there"\n'
        'POST_TRAINING_NETWORK_PROFILE = "none"\n'
    )
    folders = [tmp_path, site_sif.parent]
    keys = {"image": str(apptainer_root), "workdir": str(tmp_path), "writable": True}
    mounts = [f"{folder}:{folder}" for folder in folders]
    (tmp_path / "apptainer.toml").write_text(edf_text({**keys, "mounts": mounts}, {}))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/apptainer"
    program.write_text(
        f'#!/bin/sh\nexec {cli} edf run {tmp_path}/apptainer.toml -- /usr/bin/apptainer "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("EDF_PATH", str(tmp_path / "edf"))
    return tmp_path


def test_layer_over_a_sites_sif_is_made_verified_and_the_same_again(user, post_training, site_sif):
    checkout = user / "checkout"

    def run(*words: str | Path) -> str:
        done = post_training(*words, cwd=checkout)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("image", "lock", "small", "--base", site_sif, "--store", user / "one")
    lock = json.loads((checkout / "containers/small/base.lock").read_text())
    assert lock["sha256"] == sha256_file(site_sif)
    assert lock["file"] == str(site_sif.resolve())
    records = []
    for name in ("one", "two"):
        run("image", "push-layer", "small", "--site", "there", "--store", user / name)
        [record] = ImageStore(user / name).records()
        records.append(record)
    assert records[0]["sqsh_sha256"] == records[1]["sqsh_sha256"]
    [record, store] = [records[0], ImageStore(user / "one")]
    assert record["oci_digest"] == pair_digest(lock["sha256"], record["sqsh_sha256"])
    assert store.sif_path(lock["sha256"]).resolve() == site_sif.resolve()

    script = user / "run"
    script.write_text(
        run("edf", "render", "--image", "small", "--site", "there", "--store", store.folder)
    )
    script.chmod(0o755)
    (user / "identify.py").write_text(IDENTIFY)

    def inside(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([script, *words], capture_output=True, text=True, cwd=user)

    done = inside("python", "identify.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verified_by"] == "entrypoint"
    assert (found["sif_sha256"], found["sqsh_sha256"]) == (lock["sha256"], record["sqsh_sha256"])
    assert (found["over"], found["foreign"], found["of_the_sif"]) == ([], {}, "yes")
    assert "Run one stage of post-training." in inside("entrypoint", "--help").stdout

    # A job's EDF has the same; another layer in the place of this one is refused.
    job = run("edf", "render", "--image", "small", "--site", "there", "--as", "edf",
              "--store", store.folder)  # fmt: skip
    layer = store.image_path(record["sqsh_sha256"])
    assert f'"{layer}:/opt/post-training:image-src=/opt/post-training"' in job
    layer.chmod(0o644)
    with open(layer, "ab") as file:
        file.write(b"\0")
    done = inside("python", "identify.py")
    assert done.returncode != 0
    assert "sha256 is" in done.stderr
