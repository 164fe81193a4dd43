"""`make demo`, on the image that is there: the script itself, as a person runs it."""

import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.image, pytest.mark.slurm]
REPOSITORY = Path(__file__).parents[2]


def test_demo_ends_with_an_identical_reproduction(image_edf):
    done = subprocess.run(
        [REPOSITORY / "reproducibility/demo/demo"],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "\nidentical: " in done.stdout
    assert "\nloss         " in done.stdout
