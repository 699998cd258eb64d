#!/usr/bin/env bash
# What dist_train.sh and dist_test.sh share:
#   tools/dist_launch.sh NUM_PROCESSES TOOL [arguments of the tool]
set -euo pipefail

MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
if [ "${MAX_RESTARTS:-0}" -gt 0 ]; then
    # Processes that are started again need a store of their own: in one that is shared they find the
    # addresses of the former, and connect to them in vain.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    MEETING=(--rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:${PORT:-29500}"
        --rdzv_id=ubn_det --max_restarts="$MAX_RESTARTS")
    if [ "${NNODES:-1}" = 1 ]; then
        MEETING+=(--local_addr="$MASTER_ADDR")
    fi
else
    MEETING=(--node_rank="${NODE_RANK:-0}" --master_addr="$MASTER_ADDR"
        --master_port="${PORT:-29500}")
fi

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    "${MEETING[@]}" \
    --nproc_per_node="$1" \
    "$(dirname "$0")/$2" "${@:3}"
