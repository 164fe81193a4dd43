"""`--environment` on a real Slurm: the task's command goes through the runner, and nothing else."""

import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.slurm_cluster import TIMEOUT_S, Cluster, wait_until

pytestmark = pytest.mark.slurm

ENVIRONMENT = "--environment=image.toml"
ODD_WORDS = [
    "two words", "", "it's", 'a "quoted" word', "$HOME", "${HOME}", "`id`", "$(id)", "back\\slash",
    "*", "~", "a;b", "a&b|c>d", "new\nline", "tab\t", "--", "--environment=other.toml", "-n", "%s",
    "größe", "#", "!", " leading and trailing ",
]  # fmt: skip
VARIABLES = ("SLURM_POST_TRAINING_EDF", "POST_TRAINING_SPANK_RUNNER", "POST_TRAINING_SPANK_COMMAND")


def test_srun_command_goes_through_the_runner(cluster: Cluster) -> None:
    done = cluster.run("srun", ENVIRONMENT, "sh", "-c", "echo $INSIDE")
    edf = str(cluster.work / "image.toml")
    assert done.stdout == f"{edf}\n"
    assert done.returncode == 0
    assert cluster.calls("resolve") == [["edf", "resolve", "image.toml"]]
    assert cluster.calls("run") == [["edf", "run", edf, "--", "sh", "-c", "echo $INSIDE"]]


def test_srun_edf_is_the_same_option_by_another_name(cluster: Cluster) -> None:
    done = cluster.run("srun", "--edf=image.toml", "sh", "-c", "echo $INSIDE")
    assert (done.returncode, done.stdout) == (0, f"{cluster.work / 'image.toml'}\n")
    # Handed down to the srun inside as it was resolved, not as it was typed.
    script = "cd /; srun sh -c 'echo $INSIDE'"
    done = cluster.run("salloc", "--quiet", "--edf=image.toml", "sh", "-c", script)
    assert done.stdout == f"{cluster.work / 'image.toml'}\n"


def test_srun_edf_and_environment_of_two_names_are_refused(cluster: Cluster) -> None:
    done = cluster.run("srun", "--edf=image.toml", "--environment=other.toml", "true")
    assert done.returncode != 0
    assert "names another EDF: give one of the two" in done.stderr
    assert cluster.calls("run") == []


def test_srun_without_environment_untouched(cluster: Cluster) -> None:
    done = cluster.run("srun", "env")
    assert done.returncode == 0
    assert not any(name in done.stdout for name in ("INSIDE=", *VARIABLES))
    assert cluster.calls("resolve") == cluster.calls("run") == []


def test_srun_plugins_own_variables_hidden_from_task(cluster: Cluster) -> None:
    done = cluster.run("srun", ENVIRONMENT, "env")
    assert "INSIDE=" in done.stdout
    assert not any(name in done.stdout for name in VARIABLES)


def test_srun_odd_words_unchanged(cluster: Cluster) -> None:
    done = cluster.run("srun", ENVIRONMENT, "printf", "%s\\0", *ODD_WORDS)
    assert done.stdout.split("\0")[:-1] == ODD_WORDS


@pytest.mark.parametrize("name", ["two words.toml", "it's.toml", '"$HOME".toml', "größe;&*.toml"])
def test_srun_odd_path_unchanged(cluster: Cluster, name: str) -> None:
    path = cluster.work / name
    path.touch()
    done = cluster.run("srun", f"--environment={path}", "sh", "-c", 'echo "$INSIDE"')
    assert done.stdout == f"{path}\n"


def test_srun_odd_command_path_unchanged(cluster: Cluster) -> None:
    command = cluster.work / 'it\'s $a "command"'
    command.write_text('#!/bin/sh\necho "$0"\n')
    command.chmod(0o755)
    assert cluster.run("srun", ENVIRONMENT, str(command)).stdout == f"{command}\n"


def test_srun_relative_edf_is_looked_up_where_srun_is_called(cluster: Cluster) -> None:
    below = cluster.work / "below"
    below.mkdir()
    edf, command = "--environment=../image.toml", ("sh", "-c", "echo $INSIDE")
    done = cluster.run("srun", "--chdir=/", edf, *command, cwd=below)
    assert done.stdout == f"{below}/../image.toml\n"


@pytest.mark.parametrize("command", ["exit 0", "exit 7", "kill -KILL $$"])
def test_srun_exit_code_as_without_environment(cluster: Cluster, command: str) -> None:
    bare = cluster.run("srun", "sh", "-c", command)
    inside = cluster.run("srun", ENVIRONMENT, "sh", "-c", command)
    assert inside.returncode == bare.returncode


def test_srun_stdin_reaches_task(cluster: Cluster) -> None:
    text = "line\n" * 10_000
    assert cluster.run("srun", ENVIRONMENT, "cat", stdin=text).stdout == text


def test_srun_two_tasks_both_inside(cluster: Cluster) -> None:
    script = "echo $SLURM_PROCID of $SLURM_NTASKS $INSIDE"
    done = cluster.run("srun", "--ntasks=2", "--overcommit", ENVIRONMENT, "sh", "-c", script)
    edf = cluster.work / "image.toml"
    assert sorted(done.stdout.splitlines()) == [f"0 of 2 {edf}", f"1 of 2 {edf}"]
    assert len(cluster.calls("resolve")) == 1
    assert len(cluster.calls("run")) == 2


def test_srun_export_none_runs_inside(cluster: Cluster) -> None:
    script = "echo $INSIDE ${OUTSIDE:-nothing}"
    done = cluster.run(
        "srun", "--export=NONE", ENVIRONMENT, "sh", "-c", script, OUTSIDE="something"
    )
    assert done.stdout == f"{cluster.work / 'image.toml'} nothing\n"


def test_srun_ordinary_user_runs_inside(cluster: Cluster) -> None:
    user = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
    done = cluster.run(*user, "srun", ENVIRONMENT, "sh", "-c", "id -un; echo $INSIDE")
    assert done.stdout == f"nobody\n{cluster.work / 'image.toml'}\n"


@pytest.mark.parametrize("wanted", [signal.SIGTERM, signal.SIGUSR1])
def test_scancel_signal_reaches_task(cluster: Cluster, wanted: signal.Signals) -> None:
    # One process without a child, which scancel could signal first.
    script = (
        "import os, signal as s;"
        "s.pthread_sigmask(s.SIG_BLOCK, {s.SIGTERM, s.SIGUSR1});"
        "print(os.environ['SLURM_JOB_ID'], flush=True);"
        "os._exit(s.sigwait({s.SIGTERM, s.SIGUSR1}))"
    )
    with cluster.start("srun", ENVIRONMENT, sys.executable, "-c", script) as srun:
        assert srun.stdout is not None
        job = srun.stdout.readline().strip()
        assert cluster.run("scancel", f"--signal={wanted.name}", job).returncode == 0
        assert srun.wait(TIMEOUT_S) == wanted


def test_srun_interrupted_ends_task(cluster: Cluster) -> None:
    with cluster.start("srun", ENVIRONMENT, "sh", "-c", "echo $$; exec sleep 1000") as srun:
        assert srun.stdout is not None
        task = Path("/proc") / srun.stdout.readline().strip()
        assert (task / "exe").exists()
        srun.send_signal(signal.SIGTERM)
        assert srun.wait(TIMEOUT_S) != 0
    wait_until(lambda: not (task / "exe").exists())  # A zombie has none.


def test_srun_pty_is_a_terminal_inside(cluster: Cluster) -> None:
    ours, theirs = pty.openpty()
    try:
        srun = subprocess.Popen(
            ["srun", "--pty", ENVIRONMENT, "bash", "--norc"],
            stdin=theirs, stdout=theirs, stderr=theirs,
            cwd=cluster.work, env=cluster.environment(), start_new_session=True,
        )  # fmt: skip
        os.write(ours, b"tty >tty.txt; echo $INSIDE >inside.txt; exit 5\n")
        assert read_until_exit(ours, srun) == 5
    finally:
        os.close(ours)
        os.close(theirs)
    assert (cluster.work / "tty.txt").read_text().startswith("/dev/pts/")
    assert (cluster.work / "inside.txt").read_text() == f"{cluster.work / 'image.toml'}\n"


@pytest.mark.parametrize("submit", [("srun",), ("salloc",), ("sbatch", "--wait")])
def test_submit_unresolvable_environment_fails_with_the_runners_line(
    cluster: Cluster, submit: tuple[str, ...]
) -> None:
    script = cluster.work / "touch.sh"
    script.write_text("#!/bin/sh\ntouch started\n")
    script.chmod(0o755)
    done = cluster.run(*submit, "--environment=absent.toml", str(script))
    assert done.returncode != 0
    assert done.stderr == "error: no environment 'absent.toml'\n"
    assert not (cluster.work / "started").exists()
    assert cluster.calls("run") == []


def test_srun_runner_prints_no_path_refused(cluster: Cluster) -> None:
    done = cluster.run("srun", "--environment=not-a-path.toml", "touch", "started")
    assert done.returncode != 0
    assert "did not print one absolute path" in done.stderr
    assert not (cluster.work / "started").exists()


@pytest.fixture
def multi_prog(cluster: Cluster) -> str:
    path = cluster.work / "programs.conf"
    path.write_text("0 touch started\n")
    return str(path)


def test_srun_multi_prog_refused(cluster: Cluster, multi_prog: str) -> None:
    done = cluster.run("srun", "--ntasks=1", ENVIRONMENT, "--multi-prog", multi_prog)
    assert done.returncode != 0
    assert "srun: error: --environment: not with --multi-prog" in done.stderr
    assert not (cluster.work / "started").exists()
    wait_until(lambda: cluster.run("squeue", "--noheader").stdout == "")


def test_srun_multi_prog_with_no_plugin_where_submitted_refused_on_the_node(
    cluster: Cluster, multi_prog: str
) -> None:
    conf = cluster.work / "slurm.conf"
    settings = cluster.slurm_conf.read_text().splitlines()
    settings = [line for line in settings if not line.startswith("PlugStackConfig=")]
    conf.write_text("\n".join([*settings, "PlugStackConfig=/dev/null"]))
    edf = str(cluster.work / "image.toml")
    done = cluster.run(
        "srun", "--ntasks=1", "--multi-prog", multi_prog,
        SLURM_CONF=str(conf), SLURM_POST_TRAINING_EDF=edf,
    )  # fmt: skip
    assert done.returncode != 0
    assert "error: --environment: not with --multi-prog" in done.stderr
    assert not (cluster.work / "started").exists()


def test_srun_multi_prog_without_environment_untouched(cluster: Cluster) -> None:
    path = cluster.work / "echo.conf"
    path.write_text("0 echo zero\n")
    assert cluster.run("srun", "--ntasks=1", "--multi-prog", str(path)).stdout == "zero\n"


@pytest.mark.parametrize("export", ["ALL", "NONE"])
def test_sbatch_script_runs_inside(cluster: Cluster, export: str) -> None:
    script = cluster.work / "job.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --environment=./image.toml --output=batch.txt\n"
        'echo "$INSIDE $1 ${SLURM_POST_TRAINING_EDF:-}"\nexit 6\n'
    )
    done = cluster.run("sbatch", "--wait", f"--export={export}", str(script), "two words")
    assert done.returncode == 6
    output = (cluster.work / "batch.txt").read_text()
    assert output == f"{cluster.work}/./image.toml two words \n"
    # Not by its name: an image does not have slurmd's spool folder.
    assert cluster.calls("run")[0][4].startswith("/proc/self/fd/")


def test_salloc_shell_on_the_host_and_its_srun_inside(cluster: Cluster) -> None:
    other = cluster.work / "other.toml"
    other.touch()
    script = (
        'echo "salloc ${INSIDE:-outside}"; cd /; srun sh -c \'echo "srun $INSIDE"\';'
        f"srun --environment={other} sh -c 'echo \"other $INSIDE\"';"
        # The shell of salloc itself where Slurm starts it on the node (use_interactive_step).
        "srun --interactive sh -c 'echo \"interactive ${INSIDE:-outside}\"'"
    )
    done = cluster.run("salloc", "--quiet", ENVIRONMENT, "sh", "-c", script)
    edf = cluster.work / "image.toml"
    assert done.stdout == (f"salloc outside\nsrun {edf}\nother {other}\ninteractive outside\n")


def read_until_exit(terminal: int, process: subprocess.Popen[bytes]) -> int:
    """Empty the terminal until the process ends; one that nobody reads would block it."""

    def drain() -> bool:
        if select.select([terminal], [], [], 0.01)[0]:
            os.read(terminal, 4096)
        return process.poll() is not None

    wait_until(drain)
    return process.returncode
