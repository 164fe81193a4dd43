"""The batch script is run by bash, with programs in the place of Slurm's that write down their use.

The step's exit code, the verdict and the job's state come from files, one line for each call. As
many lines as a file fail-PROGRAM has, so often the program fails first; pauses take no time.
"""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from post_training.core.errors import UsageError
from post_training.core.files import write_json
from post_training.records.run_record import SCHEMA
from post_training.slurm.script import Container, Job, sbatch_script
from post_training.slurm.site import load_site

ANSWER = """\
answer() {{ sed -n 1p "{folder}/$1"; sed -i 1d "{folder}/$1"; }}
printf '%s\\n' "$(basename "$0")" >>"{folder}/calls"
printf '%s\\0' "$@" >"{folder}/words-$(wc -l <"{folder}/calls")"
failures="{folder}/fail-$(basename "$0")"
if [[ -s $failures ]]; then sed -i 1d "$failures"; exit 1; fi
"""
SRUN = """\
case $* in
    *post_training.slurm.outcome*)
        # Of the image's entrypoint; and srun labels lines where it is asked to.
        printf '\n== Toy 1.0 ==\nstop that now\nagain\n'
        said=$(answer verdicts)
        [[ -z $said ]] || echo "0: post-training-outcome: $said"
        [[ $said ]]
        ;;
    *post_training.stages.vet*)
        cat "$(dirname "$0")/vetted"
        exit "$(cat "$(dirname "$0")/vetting-code")"
        ;;
    *)
        code=$(answer codes)
        [[ $code != never ]] || exec sleep infinity
        exit "$code"
        ;;
esac
"""
SQUEUE = """\
case $* in
    *%x*) cat "$(dirname "$0")/excluded" ;;
    *) echo "CLUSTER: west"; answer states ;;
esac
"""
SCONTROL = """\
case "$1 $2" in
    'show hostnames') tr , "\\n" <<<"$3" ;;
    'show job') cat "$(dirname "$0")/ended" ;;
esac
"""
PROGRAMS = {
    "srun": SRUN,
    "squeue": SQUEUE,
    "scontrol": SCONTROL,
    "sinfo": "printf 'n1\\nn2\\nn3\\nn1\\n'\n",
    "scancel": "exit 0\n",
    "sleep": '[[ " 5 20 60 " == *" $1 "* ]] || exec /bin/sleep "$@"\n',
}


def write_status(run_dir: Path, status: str) -> None:
    attempts = [{"status": "finished"}]
    write_json(run_dir / "run.json", {"schema": SCHEMA, "status": status, "attempts": attempts})


@pytest.fixture
def run(tmp_path):
    """Run the script: run(code=…, states=[…], verdict=…); the exit code and the calls."""
    job = Job("sft", tmp_path / "my run", tmp_path, 3)
    job.folder.mkdir(parents=True)
    (job.folder / "failures.json").touch()
    write_status(job.run_dir, "finished")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in PROGRAMS.items():
        answer = "" if name == "sleep" else ANSWER.format(folder=tmp_path)
        text = "#!/bin/bash\n" + answer + body
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    (programs / "excluded").write_text("(null)\n")
    (programs / "ended").write_text("slurm_load_jobs error: Invalid job id specified\n")

    def bash(
        code: int | str, states: list[str], verdict: str, **scheduler
    ) -> tuple[int, list[str]]:
        site = load_site("laptop", {})
        site = site.model_copy(update={"scheduler": site.scheduler.model_copy(update=scheduler)})
        (tmp_path / "codes").write_text(f"{code}\n")
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        (tmp_path / "verdicts").write_text(f"{verdict}\n")
        (tmp_path / "calls").write_text("")
        done = subprocess.run(
            ["bash", "-c", sbatch_script(bash.job, site)],
            env={
                "PATH": f"{programs}:{os.environ['PATH']}",
                "SLURM_JOB_ID": "77",
                "SLURM_JOB_NODELIST": "n[1-2]",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_JOB_PARTITION": "main",
                # Of a task of an array; any other job has none.
                "SLURM_ARRAY_JOB_ID": "70",
                "SLURM_ARRAY_TASK_ID": "2",
            },
            capture_output=True, text=True,
        )  # fmt: skip
        bash.stderr = done.stderr
        return done.returncode, (tmp_path / "calls").read_text().split()

    bash.job = job
    bash.words = lambda number: (tmp_path / f"words-{number}").read_text().split("\0")[:-1]
    return bash


def test_script_success_forgets_the_failures_and_asks_nobody(run):
    assert run(0, ["RUNNING"], "again") == (0, ["srun"])
    assert not (run.job.folder / "failures.json").exists()


# As after a library's own _exit(0).
@pytest.mark.parametrize("status", ["running", None])
def test_script_success_of_a_run_that_is_not_finished_is_a_failure(run, status):
    record = run.job.run_dir / "run.json"
    record.unlink() if status is None else write_status(run.job.run_dir, status)
    assert run(0, ["RUNNING"], "stop") == (1, ["srun", "squeue", "srun"])
    assert f"ended with exit code 0, and its run is not finished: {record}\n" in run.stderr
    assert (run.job.folder / "failures.json").exists()
    assert run.words(3)[-4:-2] == ["--exit-code", "1"]


# In the seeds `wait` returned 138, and both requeue and resubmission ran.
def test_script_stopped_before_the_wall_time_is_requeued_exactly_once(run):
    code, calls = run(138, ["RUNNING", "RUNNING"], "again")
    assert (code, calls) == (138, ["srun", "squeue", "srun", "squeue", "scontrol"])
    assert run.words(5) == ["requeue", "77"]


# In the seeds `set -e` ended the script at the failed step, and the retry never ran.
@pytest.mark.parametrize("code", [1, 137, 255])
def test_script_failed_step_does_not_end_the_script_before_the_verdict(run, code):
    assert run(code, ["RUNNING", "RUNNING"], "again")[1][-1] == "scontrol"
    log = f"{run.job.folder}/slurm-77.out"
    assert run.words(3)[-7:-2] == ["3", "--log", log, "--exit-code", str(code)]


# In the seeds the script ended with `exit 0` after a failure.
@pytest.mark.parametrize("code", [1, 2, 138, 143])
def test_script_final_failure_keeps_its_exit_code_and_has_no_successor(run, code):
    assert run(code, ["RUNNING", "RUNNING"], "stop") == (code, ["srun", "squeue", "srun"])
    assert (run.job.folder / "failures.json").exists()


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED", ""])
def test_script_cancelled_job_has_no_successor(run, state):
    assert run(143, [state], "again") == (143, ["srun", "squeue"])


def test_script_cancelled_during_the_verdict_has_no_successor(run):
    code, calls = run(138, ["RUNNING", "COMPLETING"], "again")
    assert (code, calls) == (138, ["srun", "squeue", "srun", "squeue"])


def test_script_verdict_that_cannot_be_had_is_asked_for_again_and_then_final(run):
    assert run(1, ["RUNNING", "RUNNING"], "") == (1, ["srun", "squeue", *["srun"] * 4])
    assert "no verdict from the image (got ''), so nothing is tried again. An image" in run.stderr
    asked = ["srun", "squeue", "srun", "srun", "squeue", "scontrol"]
    assert run(1, ["RUNNING", "RUNNING"], "\nagain") == (1, asked)
    # It is the same question, whose answer may only have been lost.
    assert run.words(3) == run.words(4)
    assert run.words(4)[-2:] == ["--attempt", "77.0"]


@pytest.mark.parametrize("program", ["squeue", "scontrol"])
def test_script_program_of_slurm_that_fails_is_asked_again(run, tmp_path, program):
    (tmp_path / f"fail-{program}").write_text("x\nx\n")
    code, calls = run(138, ["RUNNING", "RUNNING"], "again")
    assert (code, calls[-1]) == (138, "scontrol")
    assert run.words(len(calls)) == ["requeue", "77"]
    assert calls.count(program) == {"squeue": 4, "scontrol": 3}[program]
    assert run.stderr.count(f"{program} does not answer; asked again in") == 2


def test_script_requeue_that_fails_for_good_says_what_to_do(run, tmp_path):
    (tmp_path / "fail-scontrol").write_text("x\n" * 9)
    code, calls = run(138, ["RUNNING", "RUNNING"], "again")
    assert (code, calls.count("scontrol")) == (138, 4)
    assert "not requeued: submit the same again to go on" in run.stderr


@pytest.mark.parametrize("nothing", ["(null)", ""])
def test_script_suspected_node_is_left_out_after_the_requeue(run, tmp_path, nothing):
    (tmp_path / "bin/excluded").write_text(f"{nothing}\n")
    calls = run(137, ["RUNNING", "RUNNING"], "again n2")[1]
    assert calls[-2:] == ["scontrol", "scontrol"]
    assert run.words(len(calls) - 1) == ["requeue", "77"]
    assert run.words(len(calls)) == ["update", "JobId=77", "ExcNodeList=n2"]


def test_script_suspected_node_is_kept_when_too_few_would_be_left(run, tmp_path):
    (tmp_path / "bin/excluded").write_text("n1\n")
    calls = run(137, ["RUNNING", "RUNNING"], "again n2")[1]
    assert run.words(len(calls)) == ["requeue", "77"]
    (tmp_path / "bin/excluded").write_text("n9\n")
    calls = run(137, ["RUNNING", "RUNNING"], "again n2")[1]
    assert run.words(len(calls)) == ["update", "JobId=77", "ExcNodeList=n9,n2"]


def test_script_stage_that_ended_without_sruns_notice_is_ended_after_two_looks(run):
    verdicts = "on\nover\non\nover\nover\nagain"
    code, calls = run("never", ["RUNNING", "RUNNING"], verdicts, watch_s=0.01)
    assert (code, calls) == (137, [*["srun"] * 6, "squeue", "srun", "squeue", "scontrol"])
    assert run.words(2)[-2] == "--over-since"
    assert "is its slurmstepd gone?" in run.stderr


def test_script_task_of_an_array_has_a_record_a_log_and_a_count_of_its_own(run):
    run.job = replace(run.job, num_workers=4)
    tally = run.job.folder / "failures-2.json"
    tally.touch()
    write_status(run.job.run_dir / "workers/2", "finished")
    assert run(0, [], "stop") == (0, ["srun"])
    assert run.words(1)[-3:] == ["--skip-finished", "workers.index=2", "workers.count=4"]
    assert not tally.exists()
    assert (run.job.folder / "failures.json").exists()
    assert run(1, ["RUNNING"], "stop") == (1, ["srun", "squeue", "srun"])
    assert "--jobs=70_2" in run.words(2)
    worker = ["--log", f"{run.job.folder}/slurm-70_2.out", "--worker", "2"]
    assert run.words(3)[-9:] == ["3", *worker, "--exit-code", "1", "--attempt", "70_2.0"]


def chained(run, job_id: str, before: str = "go", **how) -> tuple[int, list[str]]:
    run.job = replace(run.job, is_chained=True)
    ids = ["70", "77", "78", "79"] if job_id == "77" else ["77", "78", "79"]
    (run.job.folder / "chain").write_text("".join(f"{i}\n" for i in ids))
    return run(**how)


def test_script_first_of_a_chain_leaves_the_rest_to_the_next(run):
    code, calls = chained(run, "first", code=138, states=["RUNNING"] * 2, verdict="again")
    assert (code, calls) == (138, ["srun", "squeue", "srun", "squeue"])


@pytest.mark.parametrize(("code", "verdict"), [(0, "again"), (1, "stop"), (1, "")])
def test_script_chain_ends_with_its_run(run, code, verdict):
    done, calls = chained(run, "first", code=code, states=["RUNNING"] * 2, verdict=verdict)
    assert (done, calls[-1]) == (code, "scancel")
    assert run.words(len(calls)) == ["78", "79"]


@pytest.mark.parametrize("ended", ["", "   JobState=CANCELLED Reason=None"])
def test_script_next_of_a_chain_asks_first_and_ends_what_was_cancelled(run, tmp_path, ended):
    (tmp_path / "bin/ended").write_text(f"JobId=70\n{ended}\n")
    code, calls = chained(run, "77", code=0, states=["RUNNING"], verdict="stop")
    assert (code, calls) == (1, ["scontrol", "srun", "scancel"])
    assert run.words(1) == ["show", "job", "70"]
    assert run.words(2)[-1] == "--start"
    assert run.words(3) == ["78", "79"]


def test_script_next_of_a_chain_without_an_answer_says_so(run, tmp_path):
    (tmp_path / "bin/ended").write_text("JobId=70\n   JobState=CANCELLED Reason=None\n")
    code, calls = chained(run, "77", code=0, states=["RUNNING"], verdict="")
    assert (code, calls) == (1, ["scontrol", *["srun"] * 4, "scancel"])
    assert "no verdict from the image (got '')" in run.stderr


# An older image knows no --attempt, or gives its word without a mark.
@pytest.mark.parametrize("says", ["echo usage >&2; exit 2", "echo again"])
def test_script_answer_of_an_older_image_is_not_believed_and_the_log_says_why(run, tmp_path, says):
    srun = tmp_path / "bin/srun"
    srun.write_text(srun.read_text().replace("said=$(answer verdicts)", says))
    code, calls = run(138, ["RUNNING", "RUNNING"], "again")
    assert (code, calls[-1]) == (138, "srun")
    assert "An image that is older than the post-training that submitted the job" in run.stderr
    assert "To go on, submit it again" in run.stderr


@pytest.mark.parametrize("ended", ["PREEMPTED", "FAILED"])
def test_script_next_of_a_chain_goes_on_from_what_slurm_ended(run, tmp_path, ended):
    (tmp_path / "bin/ended").write_text(f"JobId=70\n   JobState={ended} Reason=None\n")
    code, calls = chained(run, "77", code=0, states=["RUNNING"], verdict="stop")
    assert (code, calls) == (0, ["scontrol", "srun", "scancel"])


def test_script_attempt_is_named_in_the_log_by_its_number(run):
    run(0, ["RUNNING"], "again")
    assert run.stderr.startswith("attempt 1 of job 77, on n[1-2]\n")


def test_script_site_without_requeue_says_so(run):
    code, calls = run(138, ["RUNNING", "RUNNING"], "again", requeue=False)
    assert (code, "scontrol" in calls) == (138, False)
    assert "submit the same again to go on" in run.stderr


def test_script_words_reach_srun_as_they_are(run):
    run(1, ["RUNNING"], "stop")
    config = str(run.job.run_dir / "slurm/config.yaml")
    assert run.words(1)[0] == f"--environment={run.job.run_dir}/slurm/environment.toml"
    assert run.words(1)[-4:] == ["entrypoint", "sft", config, "--skip-finished"]


@pytest.fixture
def vetted(run, tmp_path):
    """vetted(what the vetting step prints, its exit code): the next job of `run` is vetted so."""

    def set_answer(text: str, code: int) -> None:
        (tmp_path / "bin/vetted").write_text(text)
        (tmp_path / "bin/vetting-code").write_text(str(code))
        run.job = replace(run.job, is_vetted=True)

    return set_answer


def test_script_of_vetted_nodes_runs_the_stage(run, vetted):
    vetted("== Toy ==\nVetted: n1\nVetted: n2\n", 0)
    assert run(0, ["RUNNING"], "again") == (0, ["srun", "srun"])
    assert run.words(1)[-3:] == ["-m", "post_training.stages.vet", str(run.job.run_dir)]
    assert "entrypoint" in run.words(2)
    assert "vetted: n[1-2]\n" in run.stderr


def test_script_of_a_bad_node_names_it_and_goes_back_to_the_queue_without_it(run, vetted):
    vetted("Vetted: n1\nCordon: n2\nCordon: n2\n", 1)
    code, calls = run(0, ["RUNNING"], "again")
    # How many nodes are left is asked by two programs side by side.
    looked = ["scontrol", "sinfo"]
    assert (code, calls[:3], sorted(calls[3:5])) == (1, ["srun", "squeue", "squeue"], looked)
    assert calls[5:] == ["scontrol", "scontrol"]
    assert run.words(6) == ["requeue", "77"]
    assert run.words(7) == ["update", "JobId=77", "ExcNodeList=n2"]
    assert "vetting failed (exit code 1); bad nodes: n2\n" in run.stderr


@pytest.mark.parametrize(
    ("text", "scheduler"), [("Vetted: n1\n", {}), ("Cordon: n2\n", {"requeue": False})]
)
def test_script_of_nodes_that_cannot_be_left_out_ends(run, vetted, text, scheduler):
    vetted(text, 1)
    assert run(0, ["RUNNING"], "again", **scheduler) == (1, ["srun", "squeue"])


def test_script_of_a_bad_node_goes_back_only_so_often(run, vetted):
    vetted("Cordon: n2\n", 1)
    run.job = replace(run.job, max_failures=0)
    assert run(0, ["RUNNING"], "again") == (1, ["srun", "squeue"])


@pytest.mark.parametrize(
    ("num_tasks", "local_id", "devices", "has_cores"),
    [(8, "5", "5", True), (2, "1", "4,5,6,7", False), (1, "0", "", False)],
)
def test_script_singularity_task_sees_its_own_gpus(
    tmp_path, num_tasks, local_id, devices, has_cores
):
    """The words after srun's options are run as a task would, by a `singularity` that tells."""
    site = load_site("lumi", {"tasks_per_node": num_tasks})
    job = Job("sft", tmp_path / "run", tmp_path, 3, Container(Path("/i.sif"), {"PIN": "a b"}))
    script = sbatch_script(job, site).split("# A cancelled")[0]
    assert ("--cpu-bind=mask_cpu:" in script) == has_cores
    (tmp_path / "singularity").write_text(
        "#!/bin/sh\necho $ROCR_VISIBLE_DEVICES $SINGULARITYENV_PIN $1 $2\n"
    )
    (tmp_path / "singularity").chmod(0o755)
    task = 'for at in "${!stage[@]}"; do [[ ${stage[at]} != @(bash|singularity) ]] || break; done; '
    done = subprocess.run(
        ["bash", "-c", script + task + '"${stage[@]:at}"'],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "BASH_FUNC_module%%": '() { echo "module $*" >&2; }',
            "SLURM_LOCALID": local_id,
            "SLURM_JOB_ID": "1",
        },
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [*devices.split(), "a", "b", "exec", f"--pwd={tmp_path}"]
    assert done.stderr == "module purge\n"


@pytest.mark.parametrize("name", ["line\nbreak", "back\\slash"])
def test_script_path_that_slurm_cannot_take_is_refused(name):
    with pytest.raises(UsageError, match="Slurm cannot take it"):
        sbatch_script(Job("sft", Path("/runs") / name, Path("/"), 3), load_site("laptop", {}))
