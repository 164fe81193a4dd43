"""The sbatch script of a stage: one pure function of the job and the site.

The stage runs as one Slurm step. When it fails, a second, small step inside the same image
(slurm/outcome.py) says whether the same job may try again; the script then hands itself back to
Slurm with `scontrol requeue`. Slurm keeps one job under one id, so there is one successor at most.
srun would wait forever for a step whose slurmstepd died, so while the stage runs the script asks,
every few minutes, whether a process still works in the run folder.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from post_training.core.errors import UsageError
from post_training.slurm.singularity import script_exports, singularity_words
from post_training.slurm.site import Site

_IMAGE_BIN = "/opt/post-training"
_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch-extensions",
    "MIOPEN_USER_DB_PATH": "miopen",
    "MIOPEN_CUSTOM_CACHE_DIR": "miopen",
}


@dataclass(frozen=True)
class Container:
    """What the EDF says, for Singularity, which reads none. mounts: SRC:DST[:FLAGS]. env: values as
    they are."""

    image: Path
    env: dict[str, str]
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A stage to be run. folder: RUN/slurm, which holds config.yaml and environment.toml.
    container: on a site without EDFs. name: what the queue shows. num_workers: the job is an array
    of so many that share the run's chunks. is_chained: further jobs of the run wait behind it, and
    none is requeued. All paths are absolute."""

    stage: str
    run_dir: Path
    working_dir: Path
    max_failures: int
    container: Container | None = None
    name: str | None = None
    num_workers: int | None = None
    is_chained: bool = False

    @property
    def folder(self) -> Path:
        return self.run_dir / "slurm"


def sbatch_script(job: Job, site: Site) -> str:
    """The whole script. Errors: UsageError for a path that Slurm cannot take."""
    for path in (job.run_dir, job.working_dir):
        if any(character in str(path) for character in "\n\r\\"):
            raise UsageError("a path with a line break or \\ in it: Slurm cannot take it",
                             where=repr(str(path)))  # fmt: skip
    scheduler = site.scheduler
    shape = [
        f"--nodes={scheduler.nodes}",
        f"--ntasks-per-node={scheduler.tasks_per_node}",
        # Since 22.05 srun does not take this one over from sbatch.
        f"--cpus-per-task={scheduler.cpus_per_task}",
    ]
    stage = [
        *_srun(job, site),
        *shape,
        # When one task ends, the others get a minute to say what they have to say, and are then
        # ended: none waits forever for a dead one, and none is cut off in the middle of its error.
        "--wait=60",
        "--kill-on-bad-exit=0",
        *site.launcher.srun,
        *_inside(job, site, each_its_gpu=True),
        *(["entrypoint"] if site.launcher.kind == "edf" else [f"{_IMAGE_BIN}/bin/entrypoint"]),
        job.stage,
        str(job.folder / "config.yaml"),
        # Requeued by Slurm just after its end, it has nothing left to do.
        "--skip-finished",
    ]
    verdict = [
        *_srun(job, site),
        *("--nodes=1", "--ntasks=1", "--overlap", "--time=5"),
        *_inside(job, site),
        # -I: neither the working folder nor PYTHONPATH has a say in it.
        *(f"{_IMAGE_BIN}/venv/bin/python", "-I", "-m", "post_training.slurm.outcome"),
        *(str(job.run_dir), str(job.max_failures)),
    ]
    again = _again(job, site)
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {job.stage}, written by `post-training submit`. A requeued job runs this again.",
            "# shellcheck disable=SC2016,SC2054  # every quoted word below stands for itself",
            *_directives(job, site),
            *_exports(job, site),
            "",
            *_array("stage", stage),
            *_array("verdict", verdict),
            *_ASK.splitlines(),
            *_names(job),
            _BODY.format(
                watch_s=site.scheduler.watch_s,
                suspect="suspect" if again is _REQUEUE else "_",
                over="    end_chain\n" if job.is_chained else "",
                again=again,
                otherwise="end_chain\n" if job.is_chained else "",
            ),
        ]
    )


_WHOLE = """\
job=$SLURM_JOB_ID
record={run_dir}/run.json
tally={folder}/failures.json
verdict+=(--log {folder}/"slurm-$job.out")
"""
# Slurm gives one task of an array the number of the whole array as its job id.
_WORKER = """\
job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
record={run_dir}/workers/$SLURM_ARRAY_TASK_ID/run.json
tally={folder}/failures-$SLURM_ARRAY_TASK_ID.json
stage+=("workers.index=$SLURM_ARRAY_TASK_ID" workers.count={num_workers})
verdict+=(--log {folder}/"slurm-$job.out" --worker "$SLURM_ARRAY_TASK_ID")
"""
# The file has the chain's ids, one a line. A job of it starts however the one before it ended.
# SIGTERM stopped that one when it was cancelled, and also when it was preempted: then Slurm says
# so, or that it failed by itself, in the time of grace.
_CHAIN = """\
chain={folder}/chain
end_chain() {{
    local behind
    mapfile -t behind < <(sed "0,/^$SLURM_JOB_ID\\$/d" "$chain")
    ((${{#behind[@]}} == 0)) || scancel "${{behind[@]}}"
}}
before=$(sed "/^$SLURM_JOB_ID\\$/,\\$d" "$chain" | tail -n 1)
if [[ -n $before ]]; then
    # Of a job that Slurm has forgotten there is no state.
    show='said=$(scontrol show job "$1" 2>&1) || [[ $said == *"Invalid job id"* ]] && echo "$said"'
    ended=$(ask '/JobState=/p' bash -c "$show" show "$before")
    if [[ $ended != *JobState=@(PREEMPTED|FAILED)* ]]; then
        next=$(outcome --start)
        [[ $next == @(go|stop) ]] || say_unanswered "$next"
        if [[ $next != go ]]; then
            end_chain
            exit 1
        fi
    fi
fi
"""
_ASK = r"""
# These would change which cluster is asked, and the form of the answers.
unset SLURM_CLUSTERS SLURM_LABELIO "${!SQUEUE_@}"

# Slurm's programs fail and hang while its controller is busy: what they did not answer is asked
# again, before the run is given up. Of the answer the last line counts that sed's script prints: a
# container's entrypoint may print a banner on stdout.
patiently() {
    local pause said
    for pause in 5 20 60 -; do
        if said=$(timeout 200 "$@"); then
            echo "$said"
            return 0
        fi
        [[ $pause != - ]] || break
        echo "$1 does not answer; asked again in $pause s" >&2
        sleep "$pause"
    done
    echo "$1 does not answer" >&2
    return 1
}
ask() { patiently "${@:2}" | sed -n "$1" | tail -n 1; }
outcome() { ask 's/^.*post-training-outcome: //p' "${verdict[@]}" "$@"; }
# What has no mark is not believed, whatever it is: an older image says its word without one.
say_unanswered() {
    echo "no verdict from the image (got '$1'), so nothing is tried again. An image that is older" \
        "than the post-training that submitted the job gives none. To go on, submit it again" >&2
}
"""
_BODY = """\

# A cancelled, timed-out or preempted job is Slurm's to end: nothing may follow it from here.
is_running() {{
    [[ $(ask '/^[A-Z_]*$/p' squeue --noheader --jobs="$job" --format=%T) == RUNNING ]]
}}

# Nobody tells srun when the slurmstepd of its step dies: the run's folder does, which no process
# holds any more. Asked twice, since srun may take a minute to notice an ordinary end.
watch() {{
    local start times=0
    start=$(date +%s)
    trap 'kill $! 2>/dev/null; exit' TERM
    while ((times < 2)); do
        sleep {watch_s} &
        wait $!
        [[ $(outcome --over-since "$start") == over ]] && ((++times)) || times=0
    done
    echo 'the stage has ended, and srun has not noticed: is its slurmstepd gone?' >&2
    kill -KILL "$1"
}}

# The verdict reads what was printed since. Slurm may have requeued the attempt before by itself.
echo "attempt $((${{SLURM_RESTART_COUNT:-0}} + 1)) of job $job, on $SLURM_JOB_NODELIST" >&2
# No `set -e`: what comes after a failed step is what this script is for.
"${{stage[@]}}" &
step=$!
watch "$step" &
watcher=$!
wait "$step"
code=$?
kill "$watcher" 2>/dev/null
# A library that calls _exit(0) ends the stage in the middle of its work, and no code of ours is
# asked. Every record has this line so (core/files.py); those of its attempts lie deeper.
if ((code == 0)) && ! grep -sqx '  "status": "finished",' "$record"; then
    echo "the stage ended with exit code 0, and its run is not finished: $record" >&2
    code=1
fi
if ((code == 0)); then
    rm -f "$tally"
{over}\
    exit 0
fi
is_running || exit "$code"
attempt=$job.${{SLURM_RESTART_COUNT:-0}}
read -r next {suspect} <<<"$(outcome --exit-code "$code" --attempt "$attempt")"
[[ $next == @(again|stop) ]] || say_unanswered "$next"
if [[ $next == again ]] && is_running; then
{again}\
fi
{otherwise}\
exit "$code"
"""
_REQUEUE = """\
    left=0
    if [[ -n $suspect ]]; then
        without=$(ask '/^CLUSTER: /!p' squeue --noheader --jobs="$job" --format=%x)
        # Of no nodes some versions say `(null)`, others nothing.
        [[ -z ${without/"(null)"/} ]] && without=$suspect || without+=,$suspect
        left=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N \\
            --states=idle,allocated,mixed,completing | sort --unique |
            grep -cvxFf <(scontrol show hostnames "$without"))
    fi
    # Requeueing ends this shell, and only then can the job be told which nodes to leave out.
    trap '' TERM
    patiently scontrol requeue "$job" || echo 'not requeued: submit the same again to go on' >&2
    ((left < SLURM_JOB_NUM_NODES)) || patiently scontrol update "JobId=$job" "ExcNodeList=$without"
"""
_NO_REQUEUE = """\
    echo 'not requeued, as the site has it: submit the same again to go on' >&2
"""
# The next of the chain goes on.
_LEAVE_TO_THE_NEXT = """\
    exit "$code"
"""


def _names(job: Job) -> list[str]:
    text = (_WORKER if job.num_workers else _WHOLE) + (_CHAIN if job.is_chained else "")
    run_dir, folder = shlex.quote(str(job.run_dir)), shlex.quote(str(job.folder))
    return text.format(run_dir=run_dir, folder=folder, num_workers=job.num_workers).splitlines()


def _again(job: Job, site: Site) -> str:
    if job.is_chained:
        return _LEAVE_TO_THE_NEXT
    return _REQUEUE if site.scheduler.requeue else _NO_REQUEUE


def _directives(job: Job, site: Site) -> list[str]:
    scheduler = site.scheduler
    log = f"{job.folder}/slurm-".replace("%", "%%")
    options = {
        "job-name": job.name or f"{job.stage}-{job.run_dir.name}",
        "array": f"0-{job.num_workers - 1}" if job.num_workers else None,
        "partition": scheduler.partition,
        "account": scheduler.account,
        "reservation": scheduler.reservation,
        "time": scheduler.time,
        "nodes": scheduler.nodes,
        "ntasks-per-node": scheduler.tasks_per_node,
        "cpus-per-task": scheduler.cpus_per_task,
        "gpus-per-node": scheduler.gpus_per_node or None,
        "chdir": job.working_dir,
        "output": log + ("%A_%a.out" if job.num_workers else "%j.out"),
        "open-mode": "append",
        # To the tasks of the steps. `B:` would reach this shell alone.
        "signal": f"USR1@{scheduler.signal_s}",
    }
    words = [
        f"--{name}={shlex.quote(str(value))}"
        for name, value in options.items()
        if value is not None
    ]
    requeue = scheduler.requeue and not job.is_chained
    words += ["--requeue" if requeue else "--no-requeue", *scheduler.options]
    return [f"#SBATCH {word}" for word in words]


def _exports(job: Job, site: Site) -> list[str]:
    """Variables that reach the tasks through srun, into the container."""
    lines = ["", f"cache={shlex.quote(str(site.cache_dir))}/post-training-$SLURM_JOB_ID"]
    lines += [f'export {name}="$cache/{folder}"' for name, folder in _CACHES.items()]
    if job.container is not None:
        lines += ["", *script_exports(job.container.env)]
    return lines


def _srun(job: Job, site: Site) -> list[str]:
    if site.launcher.kind == "edf":
        return ["srun", f"--environment={job.folder / 'environment.toml'}"]
    return ["srun"]


def _inside(job: Job, site: Site, *, each_its_gpu: bool = False) -> list[str]:
    """Words between srun's options and the command in the image."""
    if job.container is None:
        return []
    container = job.container
    words = singularity_words(
        site.launcher,
        container.mounts,
        str(job.working_dir),
        str(container.image),
        container.env,
    )
    if each_its_gpu and site.launcher.gpu_variable:
        # Known in the task only.
        select = f'{site.launcher.gpu_variable}=$SLURM_LOCALID exec "$@"'
        words = ["bash", "-c", select, "task", *words]
    return words


def _array(name: str, words: Sequence[str]) -> list[str]:
    return [f"{name}=(", *(f"    {shlex.quote(word)}" for word in words), ")"]
