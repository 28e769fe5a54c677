# Sourced by array.sh and multinode.sh: runs a plan so that a signal stops it softly, and asks for the job to run again.
#
# Slurm warns the batch script (--signal=B:USR1@seconds). The plan is handed SIGUSR1, finishes what cannot be continued,
# and ends with exit code 75: "again". SIGTERM, which comes with a pre-emption, is handed on as SIGUSR1 too: srun answers
# SIGTERM by killing its tasks at once. A job that Slurm is already ending (scancel, scontrol requeue) is left to it.
requeued_when_stopped() {  # requeued_when_stopped COMMAND ...: ends this script with the command's exit code
    local child code asked job=${SLURM_JOB_ID:-}
    # the id of the whole array is that of one of its tasks, too; as ARRAY_TASK only that task is meant
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    "$@" &
    child=$!
    trap 'asked=yes; kill -USR1 "$child" 2>/dev/null || true' USR1 TERM
    while asked='' code=0; wait "$child" || code=$?; [ -n "$asked" ]; do :; done  # a signal ends `wait`, not the plan
    trap - USR1 TERM
    case $code in 75|138) ;; *) exit "$code" ;; esac  # 138: SIGUSR1 came before the plan could take it
    if [ "$(squeue --noheader --jobs "$job" --format %T)" = RUNNING ]; then
        echo "stopped with exit code $code; job $job is requeued and goes on from there"
        scontrol requeue "$job"  # Slurm ends this script
    fi
    exit 75
}
