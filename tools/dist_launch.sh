#!/usr/bin/env bash
# What dist_train.sh and dist_test.sh share:
#   tools/dist_launch.sh NUM_PROCESSES TOOL [arguments of the tool]
set -euo pipefail

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$1" \
    --max_restarts="${MAX_RESTARTS:-0}" \
    "$(dirname "$0")/$2" "${@:3}"
