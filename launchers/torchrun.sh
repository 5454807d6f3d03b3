#!/usr/bin/env bash
# Ranks through torchrun (c10d rendezvous), for machines without Slurm. Run it on every node:
#   NUM_NODES=2 MASTER_ADDR=host0 GPUS=8 launchers/torchrun.sh megamm pretrain 1b --run /shared/runs/1b
set -euo pipefail

if [ "$#" -lt 1 ]; then
    echo "usage: [NUM_NODES=n] [GPUS=n] [MASTER_ADDR=host] [MASTER_PORT=port] $0 COMMAND [ARGUMENT ...]" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Without the -- it takes --run for one of its own options.
exec torchrun \
    --nnodes "${NUM_NODES:-1}" \
    --nproc-per-node "${GPUS:-1}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29400}" \
    --rdzv-id "${RUN_ID:-megamm}" \
    --no-python -- "$here/node.sh" "$@"
