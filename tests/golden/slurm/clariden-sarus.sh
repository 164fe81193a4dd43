#!/bin/bash
# sft, written by `post-training submit`. A requeued job runs this again.
# shellcheck disable=SC2016,SC2054  # every quoted word below stands for itself
#SBATCH --job-name=sft-one
#SBATCH --partition=normal
#SBATCH --account=a1
#SBATCH --time=12:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=72
#SBATCH --gpus-per-node=4
#SBATCH --chdir=/work
#SBATCH --output=/work/runs/one/slurm/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --mem=0

cache=/dev/shm/post-training-$SLURM_JOB_ID
export TRITON_CACHE_DIR="$cache/triton"
export TORCHINDUCTOR_CACHE_DIR="$cache/inductor"
export TORCH_EXTENSIONS_DIR="$cache/torch-extensions"
export FLASHINFER_WORKSPACE_BASE="$cache/flashinfer"
export MIOPEN_USER_DB_PATH="$cache/miopen"
export MIOPEN_CUSTOM_CACHE_DIR="$cache/miopen"

run_dir=/work/runs/one
num_workers=
is_chained=no
may_requeue=yes
watch_s=300
stage=(
    srun
    --edf=/work/runs/one/slurm/environment.toml
    --nodes=2
    --ntasks-per-node=4
    --cpus-per-task=72
    --wait=60
    --kill-on-bad-exit=0
    entrypoint
    sft
    /work/runs/one/slurm/config.yaml
    --skip-finished
)
verdict=(
    srun
    --edf=/work/runs/one/slurm/environment.toml
    --nodes=1
    --ntasks=1
    --overlap
    --time=5
    /opt/post-training/venv/bin/python
    -I
    -m
    post_training.slurm.outcome
    /work/runs/one
    3
)

# What the batch script of every stage does; slurm/script.py writes the head above it, which sets
#     run_dir        the run's folder
#     num_workers    how many tasks the array has; empty for a job that is no array
#     is_chained     yes: further jobs of the run wait behind this one, and none is requeued
#     may_requeue    yes: the job may go back to the queue
#     watch_s        seconds between two looks whether the stage has ended without srun's notice
#     stage          the words that run the stage, as one Slurm step
#     verdict        the words that ask slurm/outcome.py, inside the same image, as a second step
# shellcheck shell=bash disable=SC2154  # the head sets them

# These would change which cluster is asked, and the form of the answers.
unset SLURM_CLUSTERS SLURM_LABELIO "${!SQUEUE_@}"

folder=$run_dir/slurm
if [[ -z $num_workers ]]; then
    job=$SLURM_JOB_ID
    record=$run_dir/run.json
    tally=$folder/failures.json
    verdict+=(--log "$folder/slurm-$job.out")
else
    # Slurm gives one task of an array the number of the whole array as its job id.
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    record=$run_dir/workers/$SLURM_ARRAY_TASK_ID/run.json
    tally=$folder/failures-$SLURM_ARRAY_TASK_ID.json
    stage+=("workers.index=$SLURM_ARRAY_TASK_ID" "workers.count=$num_workers")
    verdict+=(--log "$folder/slurm-$job.out" --worker "$SLURM_ARRAY_TASK_ID")
fi

# Slurm's programs fail and hang while its controller is busy, so they are asked a few times.
patiently() {
    local pause said
    for pause in 5 20 60 -; do
        said=$(timeout 200 "$@") && echo "$said" && return 0
        [[ $pause != - ]] || break
        echo "$1 does not answer; asked again in $pause s" >&2
        sleep "$pause"
    done
    echo "$1 does not answer" >&2
    return 1
}

# The last line counts that sed's script prints: a container's entrypoint may print a banner first.
ask() { patiently "${@:2}" | sed -n "$1" | tail -n 1; }
outcome() { ask 's/^.*post-training-outcome: //p' "${verdict[@]}" "$@"; }

# What has no mark is not believed, whatever it is: an older image says its word without one.
say_unanswered() {
    echo "no verdict from the image (got '$1'), so nothing is tried again. An image that is older" \
        "than the post-training that submitted the job gives none. To go on, submit it again" >&2
}

# A cancelled, timed-out or preempted job is Slurm's to end: nothing may follow it from here.
is_running() { [[ $(ask '/^[A-Z_]*$/p' squeue --noheader --jobs="$job" --format=%T) == RUNNING ]]; }

# The file has the chain's ids, one a line, in their order.
end_chain() {
    local behind
    [[ $is_chained == yes ]] || return 0
    mapfile -t behind < <(sed "0,/^$SLURM_JOB_ID\$/d" "$folder/chain")
    ((${#behind[@]} == 0)) || scancel "${behind[@]}"
}

# A job of a chain starts however the one before it ended. SIGTERM stopped that one when it was
# cancelled, and also when it was preempted: then Slurm says so, or that it failed by itself, in the
# time of grace.
stop_if_chain_was_cancelled() {
    local before show ended next
    before=$(sed "/^$SLURM_JOB_ID\$/,\$d" "$folder/chain" | tail -n 1)
    [[ -n $before ]] || return 0
    # shellcheck disable=SC2016  # the other bash expands it; a job that Slurm forgot has no state
    show='said=$(scontrol show job "$1" 2>&1) || [[ $said == *"Invalid job id"* ]] && echo "$said"'
    ended=$(ask '/JobState=/p' bash -c "$show" show "$before")
    [[ $ended != *JobState=@(PREEMPTED|FAILED)* ]] || return 0
    next=$(outcome --start)
    [[ $next == @(go|stop) ]] || say_unanswered "$next"
    [[ $next != go ]] || return 0
    end_chain
    exit 1
}

# srun waits forever for a step whose slurmstepd died. The run's folder tells it: no process holds
# it any more. Asked twice, since srun may take a minute to notice an ordinary end.
watch() {
    local start times=0
    start=$(date +%s)
    trap 'kill $! 2>/dev/null; exit' TERM
    while ((times < 2)); do
        sleep "$watch_s" &
        wait $!
        [[ $(outcome --over-since "$start") == over ]] && ((++times)) || times=0
    done
    echo 'the stage has ended, and srun has not noticed: is its slurmstepd gone?' >&2
    kill -KILL "$1"
}

# Slurm keeps one job under one id, so there is one successor at most.
# $1: the node that may be at fault, or nothing. It is left out where enough others are there.
requeue() {
    local suspect=$1 without='' left=0
    if [[ -n $suspect ]]; then
        without=$(ask '/^CLUSTER: /!p' squeue --noheader --jobs="$job" --format=%x)
        # Of no nodes some versions say `(null)`, others nothing.
        [[ -z ${without/"(null)"/} ]] && without=$suspect || without+=,$suspect
        left=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N \
            --states=idle,allocated,mixed,completing | sort --unique |
            grep -cvxFf <(scontrol show hostnames "$without"))
    fi
    # Requeueing ends this shell, and only then can the job be told which nodes to leave out.
    trap '' TERM
    patiently scontrol requeue "$job" || echo 'not requeued: submit the same again to go on' >&2
    ((left < SLURM_JOB_NUM_NODES)) || patiently scontrol update "JobId=$job" "ExcNodeList=$without"
}

[[ $is_chained != yes ]] || stop_if_chain_was_cancelled
# The verdict reads what was printed since. Slurm may have requeued the attempt before by itself.
echo "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) of job $job, on $SLURM_JOB_NODELIST" >&2
! declare -F vet >/dev/null || vet
# No `set -e`: what comes after a failed step is what this script is for.
"${stage[@]}" &
step=$!
watch "$step" &
watcher=$!
wait "$step"
code=$?
kill "$watcher" 2>/dev/null
# A library that calls _exit(0) ends the stage in the middle of its work, and no code of ours is
# asked. Every record has this line so (core/files.py); those of its attempts lie deeper.
if ((code == 0)); then
    if grep -sqx '  "status": "finished",' "$record"; then
        rm -f "$tally"
        end_chain
        exit 0
    fi
    echo "the stage ended with exit code 0, and its run is not finished: $record" >&2
    code=1
fi
is_running || exit "$code"
attempt=$job.${SLURM_RESTART_COUNT:-0}
read -r next suspect <<<"$(outcome --exit-code "$code" --attempt "$attempt")"
[[ $next == @(again|stop) ]] || say_unanswered "$next"
if [[ $next == again ]] && is_running; then
    [[ $is_chained != yes ]] || exit "$code" # The next of the chain goes on.
    if [[ $may_requeue == yes ]]; then
        requeue "$suspect"
    else
        echo 'not requeued, as the site has it: submit the same again to go on' >&2
    fi
fi
end_chain
exit "$code"
