"""`post-training doctor` with stand-ins for Slurm, Singularity and Lustre's tool."""

import json
import os
from pathlib import Path

import pytest

from post_training.core.hashing import sha256_text
from post_training.images.render import render_edf
from post_training.images.store import ImageStore

REPOSITORY = Path(__file__).parents[3]
IMAGE = "the bytes of an image"
DIGEST = sha256_text(IMAGE)
RECORD = {
    "name": "cpu", "version": "1.2.3", "platform": "linux/amd64", "input_hash": "1" * 64,
    "oci_digest": "sha256:" + "2" * 64, "sqsh_sha256": DIGEST, "sif_sha256": None,
    "size_bytes": 21, "pushed": "2026-01-01T00:00:00+00:00",
}  # fmt: skip
PROGRAMS = {
    "sbatch": "",
    "squeue": "",
    "sinfo": "echo normal; echo debug",
    "srun": "echo '  --environment=NAME'",
    "lfs": "echo 'lmm_stripe_count:  4'",
}


@pytest.fixture
def doctor(post_training, tmp_path):
    """doctor("clariden", sinfo="exit 1"): on a login node where all is well but what is said."""
    for name in ("bin", "edf", "store", "scratch"):
        (tmp_path / name).mkdir()
    store = ImageStore(tmp_path / "store")
    store.image_path(DIGEST).write_text(IMAGE)
    store.add({**RECORD, "schema": "post-training/image-record/1"})

    def run(site: str = "clariden", rendered_for: str = "clariden", *options: str, **programs: str):
        for name, body in {**PROGRAMS, **programs}.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        text = render_edf(REPOSITORY / f"edf/{rendered_for}.toml", RECORD, store)
        text = text.replace("/capstor:/capstor", f"{tmp_path}:/capstor")
        text = text.replace("/iopsstor:/iopsstor", f"{tmp_path}:/iopsstor")
        (tmp_path / "edf/post-training.toml").write_text(text)
        return post_training(
            "doctor", "--site", site, "--store", tmp_path / "store", *options,
            PATH=f"{tmp_path}/bin:{os.environ['PATH']}", EDF_PATH=str(tmp_path / "edf"),
            HOME=str(tmp_path), USER="me", XDG_CONFIG_HOME=str(tmp_path / "config"),
        )  # fmt: skip

    return run


def wrong_lines(done) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith("WRONG")]


def test_doctor_names_only_what_this_machine_lacks(doctor):
    done = doctor()
    # The one thing of Clariden that cannot be stood in for by a program.
    assert [line.split(maxsplit=1)[1] for line in wrong_lines(done)] == [
        "storage       scratch: no such folder: /iopsstor/scratch/cscs/me"
    ], done.stdout + done.stderr
    assert done.returncode == 1
    assert "ok     scheduler     srun has --environment" in done.stdout
    assert "undefined variable POST_TRAINING_PROJECT" in done.stdout


def test_doctor_of_the_laptop_is_content_without_slurm(doctor):
    done = doctor("laptop", "laptop", sinfo="echo no controller >&2; exit 1")
    assert (done.returncode, wrong_lines(done)) == (0, []), done.stdout
    assert "note   scheduler     Slurm does not answer: no controller" in done.stdout
    assert done.stdout.endswith("nothing is wrong\n")


def test_doctor_as_json_has_the_same_findings(doctor):
    done = doctor("laptop", "laptop", "--json", sinfo="echo no controller >&2; exit 1")
    assert done.returncode == 0
    findings = {each["subject"]: each for each in json.loads(done.stdout)}
    assert findings["site"]["status"] == "ok"
    assert findings["scheduler"]["status"] == "note"
    assert findings["scheduler"]["hint"]


@pytest.mark.parametrize(
    ("programs", "told"),
    [
        ({"sinfo": "echo debug"}, "no partition 'normal' (there are: debug)"),
        ({"sinfo": "exit 1"}, "Slurm does not answer"),
        ({"srun": "echo usage"}, "srun has no --environment option"),
        ({"lfs": "echo 'lmm_stripe_count: 1'"}, "images are on one storage server each"),
    ],
)
def test_doctor_says_what_is_wrong_and_exits_1(doctor, programs, told):
    done = doctor(**programs)
    assert done.returncode == 1
    assert [line for line in wrong_lines(done) if told in line], done.stdout


def test_doctor_edf_of_another_site_or_with_faults_is_wrong(doctor):
    assert "is of the site 'laptop'" in "\n".join(wrong_lines(doctor(rendered_for="laptop")))


def test_doctor_readable_token_and_value_in_the_environment_are_told(doctor, tmp_path):
    token = tmp_path / "config/post-training/credentials/hf-token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_planted")
    token.chmod(0o644)
    done = doctor("laptop", "laptop")
    assert done.returncode == 1
    assert "others can read this token (mode 0644)" in done.stdout
    assert "planted" not in done.stdout + done.stderr


def test_doctor_unknown_site_is_one_clear_line(post_training):
    done = post_training("doctor", "--site", "mars")
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "error: no site 'mars'")
