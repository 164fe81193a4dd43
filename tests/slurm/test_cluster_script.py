"""installation/slurm/cluster: up, env, down, and what it says when it cannot."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.slurm_cluster import Cluster, run_script, wait_until

pytestmark = pytest.mark.slurm


def open_below(path: Path) -> set[str]:
    """The programs that hold a file below `path` open."""
    programs = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link).startswith(f"{path}/"):
                programs.add((link.parents[1] / "comm").read_text().strip())
        except OSError:  # It ended while we looked.
            continue
    return programs


@pytest.fixture
def broken_slurmd(folder: Callable[[], Path]) -> str:
    """A PATH where slurmd fails, after slurmctld and munged have started."""
    path = folder()
    (path / "slurmd").write_text("#!/bin/sh\necho 'slurmd: no such luck'\nexit 1\n")
    (path / "slurmd").chmod(0o755)
    return f"{path}:{os.environ['PATH']}"


def test_up_twice_same_line_and_same_daemons(cluster: Cluster, runner: Path) -> None:
    pid_file = cluster.slurm_conf.with_name("slurmctld.pid")
    before = pid_file.read_text()
    up = run_script("up", str(cluster.slurm_conf.parent), POST_TRAINING_RUNNER=str(runner))
    assert up.returncode == 0
    assert up.stdout == f"export SLURM_CONF={cluster.slurm_conf}\n"
    assert pid_file.read_text() == before


def test_up_with_another_runner_refused(cluster: Cluster) -> None:
    up = run_script("up", str(cluster.slurm_conf.parent), POST_TRAINING_RUNNER="/bin/true")
    assert up.returncode == 1
    assert "already up with another runner" in up.stderr


def test_env_running_prints_line(cluster: Cluster) -> None:
    env = run_script("env", str(cluster.slurm_conf.parent))
    assert env.stdout == f"export SLURM_CONF={cluster.slurm_conf}\n"


def test_env_not_running_fails(folder: Callable[[], Path]) -> None:
    env = run_script("env", str(folder()))
    assert env.returncode == 1
    assert env.stderr.startswith("error: no cluster runs in")
    assert env.stdout == ""


def test_up_slurmd_fails_shows_log_and_leaves_nothing(
    folder: Callable[[], Path], runner: Path, broken_slurmd: str
) -> None:
    path = folder()
    up = run_script("up", str(path), POST_TRAINING_RUNNER=str(runner), PATH=broken_slurmd)
    assert up.returncode == 1
    assert "slurmd: no such luck" in up.stderr
    assert "error: no node is idle" in up.stderr
    assert up.stdout == ""
    assert open_below(path) == set()


def test_down_two_nodes_and_a_running_job_leaves_nothing(
    folder: Callable[[], Path], runner: Path
) -> None:
    path = folder()
    up = run_script("up", str(path), POST_TRAINING_RUNNER=str(runner), NODES="2")
    assert up.returncode == 0, up.stderr
    cluster = Cluster(path / "slurm.conf", path, path)
    script = "srun sh -c 'trap \"\" TERM; touch running-$SLURMD_NODENAME; exec sleep 1000'"
    assert cluster.run("sbatch", "--nodes=2", "--wrap", script).returncode == 0
    wait_until(lambda: {"running-n1", "running-n2"} <= {file.name for file in path.iterdir()})
    assert open_below(path) >= {"munged", "slurmctld", "slurmd", "slurmstepd"}
    assert run_script("down", str(path)).returncode == 0
    assert open_below(path) == set()
    assert run_script("down", str(path)).returncode == 0


def test_up_missing_programs_names_packages(folder: Callable[[], Path], runner: Path) -> None:
    # The daemons lie in sbin, everything else in bin.
    up = run_script("up", str(folder()), POST_TRAINING_RUNNER=str(runner), PATH="/usr/bin")
    assert up.returncode == 1
    assert up.stderr == (
        "error: missing packages: munge slurmctld slurmd\n"
        "hint: apt-get install --no-install-recommends munge slurmctld slurmd\n"
    )


def test_up_in_a_foreign_folder_refused(folder: Callable[[], Path], runner: Path) -> None:
    path = folder()
    (path / "thesis.tex").touch()
    up = run_script("up", str(path), POST_TRAINING_RUNNER=str(runner))
    assert up.returncode == 1
    assert "not the folder of a test cluster" in up.stderr
    assert [file.name for file in path.iterdir()] == ["thesis.tex"]
