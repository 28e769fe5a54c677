#!/usr/bin/env bash
# The steps of a table as array jobs of one GPU each, a task for each fold and model. Submit from the repository:
#
#   export DATA=data/oct OUTPUT=runs/oct FOLDS="0 1 2 3 4" MODELS="GeCA-S DiT-S LDM-B"
#   sbatch --array=0-4 scripts/slurm/array.sh 2 extract                                  5 folds; models share latents
#   sbatch --array=0-14 --dependency=afterok:ID1 scripts/slurm/array.sh 2 train sample   5 folds x 3 models
#   sbatch --array=0 scripts/slurm/array.sh 2 baseline                                   needs none of these
#   sbatch --array=0-2 --dependency=afterok:ID2:ID3 scripts/slurm/array.sh 2 classify    3 models, all folds each
#   sbatch --array=0 --dependency=afterok:ID4 scripts/slurm/array.sh 2 table
#
# The first word is the table (for 1: extract; train sample; evaluate table); flags of the table may follow the steps.
# Resubmitting goes on where it stopped; what a time limit or a pre-emption stops is requeued. docs/CLUSTERS.md
#SBATCH --job-name=geca-tables
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A-%a.txt
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
TABLE=$1
shift

export OMP_NUM_THREADS=1            # image threads and the GPU do the work; more threads would only compete
export OMP_WAIT_POLICY=PASSIVE
export PYTHONUNBUFFERED=1           # the log shows lines as they come
# export HF_HUB_OFFLINE=1 HF_HOME=$PWD/assets-hub   nodes without network: or give --assets DIR of fetch_assets.py below

read -ra FOLD <<< "${FOLDS:-0 1 2 3 4}"
read -ra MODEL <<< "${MODELS:-GeCA-S DiT-S LDM-B}"
ID=${SLURM_ARRAY_TASK_ID:-0}
case " $* " in
    *" baseline "*|*" evaluate "*|*" table "*) WHAT=(--folds "${FOLD[*]}" --models "${MODEL[*]}") ;;  # all in one task
    *" classify "*) WHAT=(--folds "${FOLD[*]}" --models "${MODEL[ID]}") ;;
    *) WHAT=(--folds "${FOLD[ID % ${#FOLD[@]}]}" --models "${MODEL[ID / ${#FOLD[@]}]}") ;;
esac
source scripts/slurm/requeue.sh
requeued_when_stopped scripts/table"$TABLE".sh --data "$DATA" --output "$OUTPUT" "${WHAT[@]}" --only "$@"
