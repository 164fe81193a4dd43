"""The real image by way of a real registry, from one machine's store to a run in another's."""

import subprocess

import pytest

from helpers.registry import serving
from helpers.sums import write_sums
from post_training.core.files import write_atomic
from post_training.images.render import render_edf
from post_training.images.store import ImageStore
from post_training.records.run_record import read_record

pytestmark = [pytest.mark.long, pytest.mark.image]


def test_reproduce_pulls_the_image_that_its_store_lacks(committed_image, post_training, tmp_path):
    store, record, checkout = committed_image
    job = tmp_path / "job"
    job.mkdir()
    write_sums(job)
    with serving(tmp_path / "registry") as registry:
        name = f"{registry.host}/me/cpu"
        done = post_training("image", "push", record["oci_digest"], name, "--store", store.folder)
        assert done.returncode == 0, done.stderr
        reference = done.stdout.strip()
        edf = render_edf(checkout / "edf/laptop.toml", store.find(record["oci_digest"]), store)
        write_atomic(tmp_path / "pushed.toml", edf)
        for stage in ("init-model init.yaml", "sft sft.yaml"):
            words = ("edf", "run", tmp_path / "pushed.toml", "--", "entrypoint", *stage.split())
            done = post_training(*words, cwd=job)
            assert done.returncode == 0, done.stderr
        assert read_record(job / "run")["image"]["registries"] == {
            name: reference.partition("@")[2]
        }

        elsewhere = ImageStore(tmp_path / "elsewhere")
        subprocess.run(["mv", job / "run", tmp_path / "handed-over"], check=True)
        words = ("reproduce", tmp_path / "handed-over", "--store", elsewhere.folder)
        done = post_training(*words, "--repository", checkout)
    assert done.returncode == 0, done.stderr
    assert f"pulling {reference}" in done.stderr
    assert done.stdout.startswith("identical: ")
    pulled = elsewhere.find(record["oci_digest"])
    assert pulled["sqsh_sha256"] == record["sqsh_sha256"]
    assert elsewhere.verify(pulled)[0].status == "ok"
