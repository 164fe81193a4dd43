"""`runs list` on a cluster that keeps accounts: what Slurm says of jobs it has forgotten."""

import pytest
from accounting import accounting, missing
from slurm_cluster import Cluster, run_script, wait_until

from post_training.launch.ended_jobs import read_ended_jobs

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.long,
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}"),
]


@pytest.fixture(scope="module")
def accounted(start_cluster, runner, folder):
    """A cluster with accounting, whose controller forgets a job soon after its end."""
    slurm_conf = start_cluster(runner)
    with open(slurm_conf, "a") as file:
        file.write("MinJobAge=2\n")
    with accounting(slurm_conf):
        yield Cluster(slurm_conf, folder(), folder())
        down = run_script("down", str(slurm_conf.parent))
        assert down.returncode == 0, down.stderr


def test_ended_jobs_are_known_from_accounts_when_the_controller_has_forgotten(
    accounted, monkeypatch
):
    monkeypatch.setenv("SLURM_CONF", str(accounted.slurm_conf))

    def submit(*words: str) -> str:
        done = accounted.run("sbatch", "--parsable", "--output=/dev/null", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    well, badly = submit("--wrap=true"), submit("--wrap=exit 3")
    array = submit("--array=0-1", "--wrap=exit $SLURM_ARRAY_TASK_ID")
    cancelled = submit("--hold", "--wrap=true")
    assert accounted.run("scancel", cancelled).returncode == 0
    pending = submit("--hold", "--wrap=true")
    asked = [well, badly, array, cancelled, pending, "999"]
    expected = {
        well: "completed", badly: "failed", array: "failed", cancelled: "cancelled by 0",
    }  # fmt: skip
    wait_until(lambda: read_ended_jobs(asked) == expected)

    def remembered() -> set[str]:
        listed = accounted.run("squeue", "--noheader", "--states=all", "--format=%F").stdout
        return set(listed.split())

    wait_until(lambda: remembered() == {pending}, timeout_s=120)
    assert read_ended_jobs(asked) == expected
