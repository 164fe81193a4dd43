"""`edf render --dev`: an EDF to work in."""

import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from post_training.core.errors import UsageError
from post_training.images.store import ImageStore
from post_training.slurm.environment import render_for_development

REPOSITORY = Path(__file__).parents[3]
DIGEST = "3" * 64
RECORD = {
    "schema": "post-training/image-record/1",
    "name": "cpu", "version": "1.2.3", "platform": "linux/amd64", "input_hash": "1" * 64,
    "oci_digest": "sha256:" + "2" * 64, "sqsh_sha256": DIGEST, "sif_sha256": None,
    "size_bytes": 21, "pushed": "2026-01-01T00:00:00+00:00",
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "checkout/src/post_training").mkdir(parents=True)
    ImageStore(tmp_path / "store").folder.mkdir()
    ImageStore(tmp_path / "store").add(RECORD)
    return tmp_path / "checkout"


def render(checkout: Path, site: str = "clariden", key: Path | None = None) -> dict:
    store = checkout.parent / "store"
    return tomllib.loads(render_for_development("cpu", site, store, REPOSITORY, checkout, key))


def test_render_for_development_is_writable_and_has_the_checkouts_code(checkout):
    edf = render(checkout)
    assert edf["writable"] is True
    assert edf["image"].endswith(f"sha256-{DIGEST}.sqsh")
    assert f"{checkout}:{checkout}" in edf["mounts"]
    assert f"{checkout}:/run/post-training/dev:ro" in edf["mounts"]
    # The site's own stay.
    assert "/capstor:/capstor" in edf["mounts"]
    assert edf["annotations"]["com.hooks.aws_ofi_nccl.enabled"] == "true"
    assert "com.hooks.ssh.enabled" not in edf["annotations"]
    # As the entrypoint looks for it: a record then says that the code may be any.
    [mount] = [text for text in edf["mounts"] if text.endswith("dev.json:ro")]
    told = json.loads(Path(mount.split(":")[0]).read_text())
    assert told == {"commit": None, "diff": None, "is_live": True}


def test_render_for_development_lets_the_owner_of_a_key_log_in(checkout, tmp_path):
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")]
    subprocess.run(words, check=True)
    annotations = render(checkout, key=tmp_path / "key.pub")["annotations"]
    assert annotations["com.hooks.ssh.enabled"] == "true"
    assert annotations["com.hooks.ssh.authorize_ssh_key"] == str(tmp_path / "key.pub")
    with pytest.raises(UsageError, match="--ssh-key: is a private key"):
        render(checkout, key=tmp_path / "key")


@pytest.mark.parametrize(
    ("content", "fault"), [("hello", "is no public key of SSH"), (None, "no such file")]
)
def test_render_for_development_what_is_no_key_is_refused(checkout, tmp_path, content, fault):
    if content is not None:
        (tmp_path / "key").write_text(content)
    with pytest.raises(UsageError, match=f"--ssh-key: {fault}"):
        render(checkout, key=tmp_path / "key")


def test_render_for_development_what_cannot_be_is_refused(checkout, tmp_path):
    with pytest.raises(UsageError, match="--dev: not a checkout of this project"):
        render(tmp_path)
    with pytest.raises(UsageError, match="--dev: lumi starts Singularity, which reads no EDF"):
        render(checkout, "lumi")
