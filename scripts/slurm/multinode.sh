#!/usr/bin/env bash
# A table on 2 nodes with 4 GPUs each, step after step. Submit from the repository:
#
#   DATA=data/oct OUTPUT=runs/oct sbatch scripts/slurm/multinode.sh 2
#
# Flags of the table may follow. The same command goes on where it stopped; what a time limit or a pre-emption stops is
# requeued. Batches are counted over all 8 processes. docs/CLUSTERS.md
#SBATCH --job-name=geca-tables
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")  # processes meet at the first node
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))          # a port of this job's own
export GPUS=${SLURM_GPUS_ON_NODE:-4}  # of each node: as many processes
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # since Slurm 22.05 srun does not take it from the job
export OMP_NUM_THREADS=4
export OMP_WAIT_POLICY=PASSIVE
export PYTHONUNBUFFERED=1
export NCCL_DEBUG=WARN              # says why where the nodes do not find each other
# export NCCL_SOCKET_IFNAME=ib0     # the network between the nodes, where NCCL picks the wrong one
# export NCCL_IB_DISABLE=1          # no InfiniBand
# export HF_HUB_OFFLINE=1           # nodes without network: fill the caches first (fetch_assets.py), or use --assets

LAUNCH="srun --kill-on-bad-exit=1 scripts/slurm/accelerate_node.sh"
source scripts/slurm/requeue.sh
requeued_when_stopped scripts/table"${1:-2}".sh --data "$DATA" --output "$OUTPUT" --launch "$LAUNCH" \
    --sample-launch "$LAUNCH" "${@:2}"
