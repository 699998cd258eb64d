#!/usr/bin/env bash
# Train on several GPUs, or on several CPU processes where there is no GPU:
#   tools/dist_train.sh CONFIG NUM_PROCESSES [options of train.py]
# On several nodes set NNODES, NODE_RANK and MASTER_ADDR on each; PORT changes the port.
# MAX_RESTARTS=3 starts all processes again, up to three times, after one has failed; with --resume.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG NUM_PROCESSES [options of train.py]" >&2
    exit 2
fi
CONFIG=$1
NUM_PROCESSES=$2
shift 2

exec "$(dirname "$0")/dist_launch.sh" "$NUM_PROCESSES" train.py "$CONFIG" --launcher pytorch "$@"
