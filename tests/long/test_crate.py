"""An exported run is what the RO-Crate project's own validator calls a Process Run Crate."""

import json
import subprocess
import sys
import zipfile

import pytest

pytestmark = [pytest.mark.long, pytest.mark.image]


@pytest.fixture
def validator(tmp_path):
    """Its program, in an environment of its own."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [venv / "bin/pip", "install", "--quiet", "roc-validator==0.13.0"]
    if subprocess.run(pip, capture_output=True).returncode != 0:
        pytest.skip("roc-validator cannot be installed here")
    return venv / "bin/rocrate-validator"


def test_exported_run_passes_the_ro_crate_validator(validator, job, post_training, tmp_path):
    assert post_training("runs", "export", job / "run", "-o", "run.zip").returncode == 0
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        archive.extractall(tmp_path / "crate")
    report = tmp_path / "report.json"
    done = subprocess.run(
        [validator, "-y", "validate", "-p", "process-run-crate-0.5", "-l", "required",
         "--skip-availability-check", "--output-format", "json", "--output-file", report,
         tmp_path / "crate"],
        capture_output=True, text=True,
    )  # fmt: skip
    if "w3id.org" in done.stdout + done.stderr or "URLError" in done.stdout + done.stderr:
        pytest.skip("the vocabulary at w3id.org cannot be reached from here")
    assert done.returncode == 0, done.stdout
    assert json.loads(report.read_text())["passed"] is True
