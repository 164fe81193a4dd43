"""A real Slurm cluster on this machine, with a stand-in for the `post-training` command line.

The stand-in implements the two commands that the SPANK plugin calls, writes down every call, and
runs a task's command with INSIDE=<the EDF's path> in its environment instead of inside an image.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "installation" / "slurm" / "cluster"
TIMEOUT_S = 30

STAND_IN = """\
#!/bin/bash
record=$(mktemp -p CALLS "$2.XXXXXX")
printf '%s\\0' "$@" >"$record"
case "$1 $2" in
    'edf resolve')
        case $3 in
            /*) path=$3 ;;
            *) path=$PWD/$3 ;;
        esac
        [[ $path != */not-a-path.toml ]] || { echo "not a path" && exit; }
        [[ -f $path ]] || { echo "error: no environment '$3'" >&2 && exit 2; }
        printf '%s\\n' "$path"
        ;;
    'edf run')
        [[ $4 == -- ]] || exit 99
        export INSIDE=$3
        shift 4
        exec "$@"
        ;;
esac
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster: `work` is a folder that every user may write, with `image.toml` in it."""

    slurm_conf: Path
    work: Path
    calls_dir: Path

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return {**kept, "SLURM_CONF": str(self.slurm_conf), **variables}

    def start(self, *argv: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd or self.work,
            env=self.environment(**variables),
        )

    def run(
        self, *argv: str, stdin: str = "", cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        with self.start(*argv, cwd=cwd, **variables) as process:
            try:
                stdout, stderr = process.communicate(stdin, timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)

    def calls(self, subcommand: str) -> list[list[str]]:
        """The arguments of each call of the stand-in's `edf <subcommand>` in this test."""
        records = sorted(self.calls_dir.glob(f"{subcommand}.*"))
        return [record.read_text().split("\0")[:-1] for record in records]


def run_script(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *argv],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=60,
    )


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
def start_cluster(folder: Callable[[], Path]) -> Iterator[Callable[[Path], Path]]:
    """Start a cluster that calls the given runner; what comes back is its SLURM_CONF."""
    started: list[Path] = []

    def start(runner: Path) -> Path:
        started.append(folder() / "cluster")
        up = run_script("up", str(started[-1]), POST_TRAINING_RUNNER=str(runner))
        if up.returncode != 0:
            pytest.fail(f"no Slurm test cluster:\n{up.stderr}", pytrace=False)
        return Path(up.stdout.strip().removeprefix("export SLURM_CONF="))

    yield start
    for path in started:
        down = run_script("down", str(path))
        assert down.returncode == 0, down.stderr


@pytest.fixture(scope="session")
def _cluster(
    start_cluster: Callable[[Path], Path], folder: Callable[[], Path], runner: Path
) -> Cluster:
    work = folder()
    work.chmod(0o777)
    (work / "image.toml").touch()
    return Cluster(start_cluster(runner), work, runner.parent / "calls")


@pytest.fixture
def cluster(_cluster: Cluster) -> Cluster:
    """The session's cluster, without calls so far."""
    for record in _cluster.calls_dir.iterdir():
        record.unlink()
    return _cluster
