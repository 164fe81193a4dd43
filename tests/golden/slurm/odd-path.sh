#!/bin/bash
# sft, written by `post-training submit`. A requeued job runs this again.
# shellcheck disable=SC2016,SC2054  # every quoted word below stands for itself
#SBATCH --job-name='sft-it'"'"'s "odd" $HOME;#%j größe'
#SBATCH --time=01:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --chdir=/work
#SBATCH --output='/work/it'"'"'s "odd" $HOME;#%%j größe/slurm/slurm-%j.out'
#SBATCH --open-mode=append
#SBATCH --signal=USR1@60
#SBATCH --requeue

cache=/tmp/post-training-$SLURM_JOB_ID
export TRITON_CACHE_DIR="$cache/triton"
export TORCHINDUCTOR_CACHE_DIR="$cache/inductor"
export TORCH_EXTENSIONS_DIR="$cache/torch-extensions"
export MIOPEN_USER_DB_PATH="$cache/miopen"
export MIOPEN_CUSTOM_CACHE_DIR="$cache/miopen"

stage=(
    srun
    '--environment=/work/it'"'"'s "odd" $HOME;#%j größe/slurm/environment.toml'
    --nodes=1
    --ntasks-per-node=1
    --cpus-per-task=1
    --wait=60
    --kill-on-bad-exit=0
    entrypoint
    sft
    '/work/it'"'"'s "odd" $HOME;#%j größe/slurm/config.yaml'
    --skip-finished
)
verdict=(
    srun
    '--environment=/work/it'"'"'s "odd" $HOME;#%j größe/slurm/environment.toml'
    --nodes=1
    --ntasks=1
    --overlap
    --time=5
    /opt/post-training/venv/bin/python
    -I
    -m
    post_training.launch.outcome
    '/work/it'"'"'s "odd" $HOME;#%j größe'
    3
)

# An image's entrypoint may greet on stdout, and srun put `0: ` before each line.
ask() {
    "${verdict[@]}" "$@" |
        sed -nE 's/^([0-9]+: )?(again( [^ ]+)?|stop|go|over|on)$/\2/p' | tail -n 1
}
job=$SLURM_JOB_ID
tally='/work/it'"'"'s "odd" $HOME;#%j größe/slurm'/failures.json
verdict+=(--log '/work/it'"'"'s "odd" $HOME;#%j größe/slurm'/"slurm-$job.out")

# A cancelled, timed-out or preempted job is Slurm's to end: nothing may follow it from here.
is_running() { [[ $(squeue --noheader --jobs="$job" --format=%T) == RUNNING ]]; }

# Nobody tells srun when the slurmstepd of its step dies: the run's folder does, which no process
# holds any more. Asked twice, since srun may take a minute to notice an ordinary end.
watch() {
    local start times=0
    start=$(date +%s)
    trap 'kill $! 2>/dev/null; exit' TERM
    while ((times < 2)); do
        sleep 300 &
        wait $!
        [[ $(ask --over-since "$start") == over ]] && ((++times)) || times=0
    done
    echo 'the stage has ended, and srun has not noticed: is its slurmstepd gone?' >&2
    kill -KILL "$1"
}

# The verdict reads what was printed since. Slurm may have requeued the attempt before by itself.
echo "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) of job $job, on $SLURM_JOB_NODELIST" >&2
# No `set -e`: what comes after a failed step is what this script is for.
"${stage[@]}" &
step=$!
watch "$step" &
watcher=$!
wait "$step"
code=$?
kill "$watcher" 2>/dev/null
if ((code == 0)); then
    rm -f "$tally"
    exit 0
fi
is_running || exit "$code"
read -r next suspect <<<"$(ask --exit-code "$code")"
[[ -n $next ]] || echo 'no verdict could be had: the job ends here' >&2
if [[ $next == again ]] && is_running; then
    left=0
    if [[ -n $suspect ]]; then
        without=$(squeue --noheader --jobs="$job" --format=%x)
        # Of no nodes some versions say `(null)`, others nothing.
        [[ -z ${without/"(null)"/} ]] && without=$suspect || without+=,$suspect
        left=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N \
            --states=idle,allocated,mixed,completing | sort --unique |
            grep -cvxFf <(scontrol show hostnames "$without"))
    fi
    # Requeueing ends this shell, and only then can the job be told which nodes to leave out.
    trap '' TERM
    scontrol requeue "$job"
    ((left < SLURM_JOB_NUM_NODES)) || scontrol update "JobId=$job" "ExcNodeList=$without"
fi
exit "$code"
