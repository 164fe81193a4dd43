# With `submit --vet`: the job's nodes are looked at before the stage starts, and a bad one is left
# out of the next attempt. slurm/script.py puts this before job.sh, whose functions it calls, and sets
#     vetting       the words of the step that looks
#     max_vettings  how often a job may go back to the queue for a bad node
# The step prints `Vetted: NODE` and `Cordon: NODE`, as https://github.com/eth-cscs/vetnode does.
# shellcheck shell=bash disable=SC2154  # the head and job.sh set them

vet() {
    local said code=0 bad
    # Two minutes of work, and one to start.
    said=$(timeout 180 "${vetting[@]}") || code=$?
    bad=$(sed -n 's/^Cordon: *//p' <<<"$said" | sort --unique | paste -sd,)
    if [[ -z $bad ]] && ((code == 0)); then
        echo "vetted: $SLURM_JOB_NODELIST" >&2
        return 0
    fi
    echo "vetting failed (exit code $code); bad nodes: ${bad:-none can be named}" >&2
    is_running || exit 1
    if [[ -n $bad && $may_requeue == yes ]] && ((${SLURM_RESTART_COUNT:-0} < max_vettings)); then
        requeue "$bad"
    fi
    end_chain
    exit 1
}
