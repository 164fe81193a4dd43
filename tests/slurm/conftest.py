"""A real Slurm cluster on this machine for the session, whose tasks run through a stand-in."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.slurm_cluster import STAND_IN, Cluster, run_script


@pytest.fixture(scope="session")
def folder() -> Iterator[Callable[[], Path]]:
    """Make a folder that ordinary users can enter: pytest's own, below /tmp, are closed to them."""
    made: list[Path] = []

    def make() -> Path:
        made.append(Path(tempfile.mkdtemp(prefix="slurm-test-", dir="/tmp")))
        made[-1].chmod(0o755)
        return made[-1]

    yield make
    for path in made:
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def runner(folder: Callable[[], Path]) -> Path:
    """The stand-in; its calls go into the folder `calls` beside it."""
    path = folder() / "post-training"
    calls = path.parent / "calls"
    calls.mkdir()
    calls.chmod(0o777)
    path.write_text(STAND_IN.replace("CALLS", str(calls)))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def start_cluster(folder: Callable[[], Path]) -> Iterator[Callable[..., Path]]:
    """Start a cluster that calls the given runner, with further variables of the script; what
    comes back is its SLURM_CONF."""
    started: list[Path] = []

    def start(runner: Path, **variables: str) -> Path:
        started.append(folder() / "cluster")
        up = run_script("up", str(started[-1]), POST_TRAINING_RUNNER=str(runner), **variables)
        if up.returncode != 0:
            pytest.fail(f"no Slurm test cluster:\n{up.stderr}", pytrace=False)
        return Path(up.stdout.strip().removeprefix("export SLURM_CONF="))

    yield start
    for path in started:
        down = run_script("down", str(path))
        assert down.returncode == 0, down.stderr


@pytest.fixture(scope="session")
def slurm_conf(start_cluster: Callable[[Path], Path], runner: Path) -> Path:
    return start_cluster(runner)


@pytest.fixture
def cluster(slurm_conf: Path, runner: Path, folder: Callable[[], Path]) -> Cluster:
    """The session's cluster, with a fresh folder and no calls of the stand-in so far."""
    work = folder()
    work.chmod(0o777)
    (work / "image.toml").touch()
    calls_dir = runner.parent / "calls"
    for record in calls_dir.iterdir():
        record.unlink()
    return Cluster(slurm_conf, work, calls_dir)
