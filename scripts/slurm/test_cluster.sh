#!/usr/bin/env bash
# Tries the scripts of this folder on a real Slurm: two "nodes" on this machine, as root or not, some 10 minutes on two
# CPU cores. Tiny tables are made without and with interruptions, and must end with the same files.
#
#   scripts/slurm/test_cluster.sh [PART ...]     array, time_limit, multinode (default: all)
#
# Everything lies in a temporary folder, with a munge key, sockets and ports of its own, and is gone at the end. Needs
# Slurm (built with --enable-multiple-slurmd, as Debian's is) and munge: apt-get install slurm-wlm munge
set -euo pipefail
[ $# -gt 0 ] || set -- array time_limit multinode
PARTS=("$@")
for part in "${PARTS[@]}"; do
    case $part in array|time_limit|multinode) ;; *)
        echo "test_cluster.sh: error: found $part, expected array, time_limit or multinode" >&2
        exit 2 ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$PATH:/usr/sbin:/sbin"
for program in munged mungekey slurmctld slurmd sbatch; do
    command -v $program > /dev/null || {
        echo "test_cluster.sh: error: no $program; expected Slurm and munge (apt-get install slurm-wlm munge)" >&2
        exit 2
    }
done
source scripts/setup.sh
while IFS= read -r name; do unset "$name"; done < <(compgen -e | grep -E '^(SLURM|SBATCH|SRUN)_')  # of a cluster around us

T=$(mktemp -d)
chmod 711 "$T"  # munged wants its socket within reach of all
say() { printf '%4d s  %s\n' $SECONDS "$*"; }
fail() { say "FAILED: $*"; tail -n 30 "$T"/*.txt; exit 1; } >&2

# ---- the cluster

ended() {  # ended PIDFILE: tell the daemon to end and wait until it has
    local pid
    pid=$(cat "$1" 2>/dev/null) && kill "$pid" 2>/dev/null || return 0
    for _ in {1..100}; do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
    kill -KILL "$pid"
}
tear_down() {
    trap '' INT TERM HUP
    if [ -e "$T/slurmctld.pid" ]; then
        scancel --user "$(id -un)" || true
        for _ in {1..60}; do [ -n "$(squeue --noheader)" ] || break; sleep 0.5; done
    fi
    for daemon in "$T"/slurmd-*.pid "$T/slurmctld.pid" "$T/munged.pid"; do ended "$daemon"; done
    rm -rf "$T"
}
trap tear_down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

free_ports() {
    python - <<< 'import socket
held = [socket.create_server(("", 0)) for _ in range(3)]
print(*sorted(s.getsockname()[1] for s in held))'
}

set_up() {
    local port second third
    read -r port second third < <(free_ports)
    mkdir "$T/log" "$T/state"
    touch "$T"/gpu{0..3}  # what nodes show for GPUs, so that the scripts may ask for them
    echo "Name=gpu File=$T/gpu[0-3]" > "$T/gres.conf"
    # The names of the nodes are addresses too (127.0.0.1 and 127.0.0.2): processes meet at the name of the first one.
    cat > "$T/slurm.conf" << END
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits as long as a credential lives: 120 seconds unless told otherwise
AuthInfo=socket=$T/munge.socket,cred_expire=10
StateSaveLocation=$T/state
SlurmdSpoolDir=$T/spool-%n
SlurmctldPidFile=$T/slurmctld.pid
SlurmdPidFile=$T/slurmd-%n.pid
SlurmctldLogFile=$T/log/slurmctld
SlurmdLogFile=$T/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=bf_interval=2
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
NodeName=0x7f00000[1-2] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=[$second,$third] CPUs=64 Gres=gpu:4
PartitionName=test Nodes=ALL Default=YES State=UP
END
    export SLURM_CONF=$T/slurm.conf
    mungekey --create --keyfile="$T/munge.key"
    munged --key-file="$T/munge.key" --socket="$T/munge.socket" --pid-file="$T/munged.pid" \
        --log-file="$T/log/munged" --seed-file="$T/munge.seed"
    slurmctld -f "$SLURM_CONF"
    for node in 0x7f000001 0x7f000002; do
        mkdir "$T/spool-$node"
        slurmd -N $node -f "$SLURM_CONF"
    done
    until_true "two idle nodes" two_idle
    say "$(slurmctld -V): $(sinfo --noheader --format "%D nodes %T") of 64 CPUs and 4 GPUs each, both made up"
}
two_idle() { [ "$(sinfo --noheader --states=idle --format %D)" = 2 ]; }

until_true() {  # until_true WHAT COMMAND ...: wait for it, ten minutes at most
    local what=$1 until=$((SECONDS + 600))
    shift
    while ! "$@"; do
        [ $SECONDS -lt $until ] || fail "waited ten minutes for $what"
        sleep 0.2
    done
}

# ---- jobs

submit() { sbatch --parsable --output="$T/job-%j.txt" "$@"; }
field() { scontrol show job "$1" --oneliner | grep -o "$2=[A-Z0-9_]*" | cut -d= -f2 | sort -u; }
state() { field "$1" JobState; }  # of an array: of all its tasks
restarts() { field "$1" Restarts; }
over() { ! state "$1" | grep -qvE '^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY)$'; }
ends_well() {
    until_true "the end of job $1" over "$1"
    [ "$(state "$1")" = COMPLETED ] || fail "job $1: $(state "$1")"
}
run_of() { echo "$OUTPUT/train/GeCA-XS-fold-$1/000-GeCA-XS-$1"; }  # of fold $1
trains() { [ -s "$(run_of "$1")/metrics.jsonl" ]; }
continued() {  # training of fold $1 was stopped amidst, and went on from there
    local log
    log=$(run_of "$1")/log.txt
    grep -qE 'continuing from step [1-9]' "$log" || fail "fold $1 was not continued: $(cat "$log")"
    grep -oE '(stopped at|continuing from|complete).*' "$log" | while read -r line; do say "    fold $1: $line"; done
}
same_as_uninterrupted() {
    python scripts/slurm/same_files.py "$T/uninterrupted" "$OUTPUT" > "$T/same.txt" || fail "not the same files"
    say "    $(cat "$T/same.txt")"
}

# ---- what is tried

array() {
    say "array.sh: Table 1 of two folds without Slurm and without interruption, for comparison"
    OMP_NUM_THREADS=1 scripts/table1.sh --data "$DATA" --output "$OUTPUT" --models "$MODELS" "${FLAGS[@]}" \
        > "$T/table1.txt" 2>&1 || fail "table1.sh"
    mv "$OUTPUT" "$T/uninterrupted"
    say "array.sh: an array of a task per fold for each step, each waiting for the one before"
    local extract train table fold
    extract=$(submit --array=0-1 scripts/slurm/array.sh 1 extract "${FLAGS[@]}")
    train=$(submit --array=0-1 --dependency=afterok:"$extract" scripts/slurm/array.sh 1 train sample "${FLAGS[@]}")
    table=$(submit --array=0 --dependency=afterok:"$train" scripts/slurm/array.sh 1 evaluate table "${FLAGS[@]}")
    until_true "the training of fold 0" trains 0
    scontrol requeue "${train}_0"
    say "    fold 0: scontrol requeue amidst training"
    until_true "the training of fold 1" trains 1
    scancel --batch --signal=USR1 "${train}_1"
    say "    fold 1: SIGUSR1 to the batch script amidst training"
    ends_well "$train"
    ends_well "$table"
    for fold in 0 1; do
        [ "$(restarts "${train}_$fold")" = 1 ] || fail "fold $fold ran $(restarts "${train}_$fold") times more, not once"
        continued $fold
    done
    same_as_uninterrupted
}

time_limit() {
    say "array.sh: a training that its time limit of 2 minutes will not let end, with a warning a minute before"
    local job lines
    job=$(submit --array=0 --time=2 --signal=B:USR1@60 scripts/slurm/array.sh 1 extract train "${FLAGS[@]}" \
        --epochs 1000000)
    until_true "a second run of job $job" runs_again "${job}_0"
    say "    requeued by itself; runs again"
    lines=$(cat "$(run_of 0)/metrics.jsonl" 2> /dev/null | wc -l)
    until_true "its training" has_more_lines "$lines" "$(run_of 0)/metrics.jsonl"
    say "    $(wc -l < "$(run_of 0)/metrics.jsonl") lines of metrics, $lines of them from the first run"
    scancel "$job"
    until_true "the end of job $job" over "$job"
    [ "$(state "$job")" = CANCELLED ] || fail "job $job: $(state "$job"), expected CANCELLED"
    say "    scancel ended it for good"
}
has_more_lines() { [ "$(cat "$2" 2> /dev/null | wc -l)" -gt "$1" ]; }
runs_again() { [ "$(state "$1")" = RUNNING ] && [ "$(restarts "$1")" -gt 0 ]; }

multinode() {
    local nodes job
    nodes=(--gpus-per-node=1 --cpus-per-task=2 scripts/slurm/multinode.sh 2 --models "$MODELS" --folds 0 "${FLAGS[@]}")
    say "multinode.sh: Table 2 of fold 0 on two nodes without interruption, for comparison"
    job=$(submit "${nodes[@]}")
    ends_well "$job"
    mv "$OUTPUT" "$T/uninterrupted"
    say "multinode.sh: the same with interruptions"
    job=$(submit "${nodes[@]}")
    until_true "training" trains 0
    scancel --batch --signal=USR1 "$job"
    say "    SIGUSR1 to the batch script amidst training"
    until_true "the end of sampling" test -e "$OUTPUT/done/sample-train-GeCA-XS-0"
    scontrol requeue "$job"
    say "    scontrol requeue amidst a classifier"
    ends_well "$job"
    [ "$(restarts "$job")" = 2 ] || fail "job $job ran $(restarts "$job") times more, expected 2"
    continued 0
    same_as_uninterrupted
}

set_up
python prepare_data.py --source phantom --count 48 --folds 2 --image-size 64 --output "$T/data" > "$T/prepare.txt"
export DATA=$T/data OUTPUT=$T/output MODELS=GeCA-XS FOLDS="0 1" PRECISION=no CUDA_VISIBLE_DEVICES=
FLAGS=(--image-size 64 --vae retina --epochs 16 --batch 4 --validate-every 8 --steps 5 --sampler dpmpp --expand 2
    --features retina --lpips none --backbone test_convnext.r160_in1k --classify-size 64 --classify-epochs 3
    --extra-train "--lr 5e-4 --ema-decay 0.99 --val-samples 4 --num-sampling-steps 4 --log-every 5 --ckpt-every 10"
    --extra-classify "--no-pretrained --optimizer adamw --lr 1e-3 --global-batch-size 8")
for part in "${PARTS[@]}"; do
    rm -rf "$T/output" "$T/uninterrupted"
    $part
done
say "all as it should be"
