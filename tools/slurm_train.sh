#!/usr/bin/env bash
# Train on a SLURM cluster, one torchrun per node:
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]
# GPUS (8) in all, GPUS_PER_NODE (8), CPUS_PER_TASK (5 per GPU), SRUN_ARGS and PORT can be set.
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]" >&2
    exit 2
fi
PARTITION=$1
JOB_NAME=$2
CONFIG=$3
WORK_DIR=$4
shift 4
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
CPUS_PER_TASK=${CPUS_PER_TASK:-5}

# dist_train.sh runs once on each node; the first node of the job is the meeting point.
exec srun -p "$PARTITION" \
    --job-name="$JOB_NAME" \
    --gres="gpu:$GPUS_PER_NODE" \
    --nodes="$(((GPUS + GPUS_PER_NODE - 1) / GPUS_PER_NODE))" \
    --ntasks-per-node=1 \
    --cpus-per-task="$((CPUS_PER_TASK * GPUS_PER_NODE))" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    bash -c 'NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID \
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) exec "$@"' _ \
    "$(dirname "$0")/dist_train.sh" "$CONFIG" "$GPUS_PER_NODE" --work-dir "$WORK_DIR" "$@"
