"""reproducibility/arithmetic-preference as a person runs it: policies improve as they once did."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.image]
REPRODUCIBILITY = Path(__file__).parents[2] / "reproducibility"
EXPERIMENT = "reproducibility/arithmetic-preference"


def test_policies_improve_as_they_once_did(image_edf, post_training, tmp_path: Path):
    for name in ("arithmetic-preference", "gsm8k-alignment"):
        shutil.copytree(REPRODUCIBILITY / name, tmp_path / "reproducibility" / name)
    pipeline = f"{EXPERIMENT}/pipeline.yaml"
    done = post_training("pipeline", "run", pipeline, "--environment", image_edf)
    assert done.returncode == 0, done.stderr
    found = subprocess.run([f"{EXPERIMENT}/compare"], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
