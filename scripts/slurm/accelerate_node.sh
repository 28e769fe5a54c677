#!/usr/bin/env bash
# This node's share of a script: srun scripts/slurm/accelerate_node.sh train.py --model GeCA-S ...
# accelerate has to be told the number of its node, which only srun knows; multinode.sh sets the rest.
trap '' USR1  # ends the launcher otherwise; the script, which srun tells too, stops by itself
exec accelerate launch --multi_gpu --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes $((SLURM_NNODES * GPUS)) --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
    --mixed_precision "${PRECISION:-fp16}" --dynamo_backend no "$@"
