#!/usr/bin/env bash
# Ranks through DeepSpeed's launcher (pdsh over ssh), for machines without Slurm. Run it on one node:
#   HOSTFILE=hosts launchers/deepspeed.sh megamm pretrain 1b --run /shared/runs/1b
# Each line of the hostfile is `NAME slots=GPUS`. The checkout, its environment and the working folder lie at the same paths everywhere.
set -euo pipefail

if [ "$#" -lt 1 ] || [ ! -r "${HOSTFILE:-}" ]; then
    echo "usage: HOSTFILE=file [MASTER_ADDR=host] [MASTER_PORT=port] [SSH_PORT=port] $0 COMMAND [ARGUMENT ...]" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
num_hosts=$(grep -c '^[^#[:space:]]' "$HOSTFILE" || true)

words=("$@")
if [ "$num_hosts" -gt 1 ]; then
    if ! command -v pdsh >/dev/null; then
        echo "$HOSTFILE names $num_hosts hosts, which takes pdsh: install it, or use launchers/torchrun.sh on every node" >&2
        exit 2
    fi
    # The words pass pdsh, which reads %, and a shell on every node. DeepSpeed's quotes leave $ and ` alive, and it gives them to words
    # with a space: so these have neither.
    for ((i = 0; i < ${#words[@]}; i++)); do
        if [[ -z ${words[i]} || ${words[i]} == *[!A-Za-z0-9_@+=:,./-]* ]]; then
            bytes=$(printf %s "${words[i]}" | od -An -v -tx1 | tr -d '\n')
            words[i]="\$'${bytes// /\\x}'"
        fi
    done
    # What ssh does not carry over; DeepSpeed reads this file and sets its lines on every node.
    DS_ENV_FILE=$(mktemp)
    export DS_ENV_FILE
    trap 'rm -f "$DS_ENV_FILE"' EXIT
    for name in MEGAMM_VENV MEGAMM_DS_CONFIGS OMP_NUM_THREADS DS_ACCELERATOR NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME TMPDIR MEGAMM_SCRATCH; do
        [ -z "${!name:-}" ] || echo "$name=${!name}" >>"$DS_ENV_FILE"
    done
fi

more=()
[ -z "${MASTER_ADDR:-}" ] || more+=(--master_addr "$MASTER_ADDR")
[ -z "${SSH_PORT:-}" ] || more+=(--ssh_port "$SSH_PORT")
deepspeed --hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}" "${more[@]}" --no_python --no_local_rank "$here/node.sh" "${words[@]}"
