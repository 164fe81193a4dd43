"""The image's SIF in the real Apptainer, which Debian has in sid: our runner carries that."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from post_training.images.edf import load_edf
from post_training.images.push import make_squashfs, push_sif
from post_training.images.render import edf_text, image_environment
from post_training.images.store import ImageStore, default_store

pytestmark = [pytest.mark.long, pytest.mark.image]
INIT = """
architecture: llama
hidden_size: 32
num_hidden_layers: 1
num_attention_heads: 2
num_key_value_heads: 2
intermediate_size: 64
max_position_embeddings: 128
vocab_size: 300
corpus: [corpus.jsonl]
run_dir: init
"""


@pytest.fixture(scope="module")
def stored(image_edf) -> tuple[ImageStore, dict]:
    """The real store, and the record of the image with its SIF."""
    store = ImageStore(default_store())
    digest = load_edf(image_edf, os.environ, Path("/")).env["POST_TRAINING_IMAGE_SQSH_SHA256"]
    record = store.record(digest)
    return store, record if record.get("sif_sha256") else push_sif(record, store)


@pytest.fixture(scope="module")
def apptainer_root(tmp_path_factory) -> Path:
    """A squashfs with Apptainer in it."""
    folder = tmp_path_factory.mktemp("sid")
    hosts = 'echo "127.0.0.1 localhost" >"$1/etc/hosts"'
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase",
         '--aptopt=Acquire::Check-Valid-Until "false"', "--include=apptainer,squashfuse",
         f"--customize-hook={hosts}", "sid", folder / "root"],
        check=True,
    )  # fmt: skip
    make_squashfs(folder / "root", folder / "sid.sqsh")
    return folder / "sid.sqsh"


@pytest.fixture
def apptainer(stored, apptainer_root, post_training, tmp_path):
    """Run `apptainer WORDS`, with the test's folder and the store at their own paths."""
    folders = [tmp_path, stored[0].folder]
    environment = tmp_path / "apptainer.toml"
    environment.write_text(
        edf_text(
            {
                "image": str(apptainer_root),
                "workdir": str(tmp_path),
                "writable": True,
                "mounts": [f"{folder}:{folder}" for folder in folders],
            },
            {},
        )
    )

    def run(*words: str | Path) -> str:
        done = post_training("edf", "run", environment, "--", "apptainer", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_apptainer_reads_header_labels_and_environment(stored, apptainer):
    store, record = stored
    sif = store.sif_path(record["sif_sha256"])
    labels = json.loads(apptainer("inspect", "--json", sif))["data"]["attributes"]["labels"]
    assert labels["org.post-training.oci-digest"] == record["oci_digest"]
    assert labels["org.post-training.input-hash"] == record["input_hash"]
    assert "Primary Architecture: amd64" in apptainer("sif", "header", sif)
    variables = apptainer("exec", "--userns", "--cleanenv", sif, "printenv").splitlines()
    for name, value in record["environment"].items():
        assert f"{name}={value}" in variables


def test_stage_in_apptainer_is_tied_to_the_sif(stored, apptainer, tmp_path):
    store, record = stored
    sif = store.sif_path(record["sif_sha256"])
    (tmp_path / "corpus.jsonl").write_text('{"text": "one and two and three"}\n' * 20)
    (tmp_path / "init.yaml").write_text(INIT)
    pins = image_environment(record, sif).items()
    apptainer(
        "exec", "--userns", "--cleanenv", *(f"--env={name}={value}" for name, value in pins),
        f"--bind={tmp_path}", f"--bind={store.folder}:{store.folder}:ro", f"--pwd={tmp_path}",
        sif, "entrypoint", "init-model", "init.yaml",
    )  # fmt: skip
    run = json.loads((tmp_path / "init/run.json").read_text())
    assert run["status"] == "finished"
    assert run["image"]["verified_by"] == "entrypoint"
    assert run["image"]["sif_sha256"] == record["sif_sha256"]
    assert run["image"]["oci_digest"] == record["oci_digest"]
