"""The experiments of reproducibility/ as a person runs them: what comes out is what once did."""

import shutil
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.image]
from helpers.real_data import GSM8K, needs_gsm8k

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name",
    [
        "arithmetic-preference",
        pytest.param("gsm8k-alignment", marks=needs_gsm8k),
    ],
)
def test_experiment_gives_what_it_once_gave(image_edf, post_training, tmp_path: Path, name: str):
    # gsm8k-alignment looks for the data beside the checkout.
    work = tmp_path / "work"
    shutil.copytree(REPOSITORY / "reproducibility", work / "reproducibility")
    environment = image_edf
    if (own := work / f"reproducibility/{name}/environment.toml").exists():
        (tmp_path / "shared/data").mkdir(parents=True)
        (tmp_path / "shared/data/gsm8k").symlink_to(GSM8K)
        (work / "edf").mkdir()
        shutil.copy(image_edf, work / "edf/post-training.toml")
        environment = own
    folder = f"reproducibility/{name}"
    done = post_training(
        "experiment", "check", folder, "--environment", environment, cwd=work, PWD=str(work)
    )
    # Identical, or on another machine equivalent.
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert done.stdout.startswith(("identical", "equivalent"))
