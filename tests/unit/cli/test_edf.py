"""`post-training data …` on a host without the training stack."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is not None, reason="the stack is here, so no image is entered"
)


@pytest.fixture
def data(post_training: Callable, tmp_path: Path) -> Callable:
    """Run `post-training data ARGUMENTS` where there is an EDF "fake", whose image is missing."""
    edf = 'image = "missing.sqsh"\nmounts = ["${PWD}:${PWD}"]\n'
    (tmp_path / "fake.toml").write_text(edf)
    return lambda *arguments: post_training("data", *arguments, EDF_PATH=str(tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "cfg.yaml", "a.b=1", "--html", "sub/page.html"],
        ["count", "--indexed", "prefix", "--per-sample", "samples.tsv"],
        ["fetch", "owner/name", "--hub-dir", "hub"],
    ],
)
def test_data_command_is_run_in_the_image_of_the_environment(data: Callable, arguments: list[str]):
    done = data(*arguments, "--environment", "fake")
    assert done.returncode == 1
    assert "missing.sqsh: no such image" in done.stderr
    done = data(*arguments)
    assert done.returncode == 2
    assert "no EDF 'post-training'" in done.stderr


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--html", ["inspect", "cfg.yaml"]),
        ("--per-sample", ["count", "cfg.yaml"]),
        ("--hub-dir", ["fetch", "owner/name"]),
    ],
)
def test_data_output_that_the_container_would_keep_is_refused(
    data: Callable, option: str, arguments: list[str]
):
    done = data(*arguments, option, "/tmp/elsewhere", "--environment", "fake")
    assert done.returncode == 2
    assert f"error: {option}: must be below the working directory" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["inspect"], ["count", "cfg.yaml", "--indexed", "x"], ["inspect", "--indexed", "x"]],
)
def test_data_command_without_one_source_is_refused(data: Callable, arguments: list[str]):
    done = data(*arguments, "--environment", "fake")
    assert done.returncode == 2
    assert done.stderr.startswith("error: give ")
