#!/usr/bin/env bash
# Test on several GPUs, or on several CPU processes where there is no GPU:
#   tools/dist_test.sh CONFIG CHECKPOINT NUM_PROCESSES [options of test.py]
# On several nodes set NNODES, NODE_RANK and MASTER_ADDR on each; PORT changes the port.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT NUM_PROCESSES [options of test.py]" >&2
    exit 2
fi
CONFIG=$1
CHECKPOINT=$2
NUM_PROCESSES=$3
shift 3

exec "$(dirname "$0")/dist_launch.sh" "$NUM_PROCESSES" test.py "$CONFIG" "$CHECKPOINT" --launcher pytorch "$@"
