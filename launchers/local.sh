#!/usr/bin/env bash
# n ranks on this machine:   launchers/local.sh 2 megamm pretrain tiny --run runs/tiny
# SIGTERM, SIGINT and SIGUSR1 reach every rank; when one rank fails, the others are ended too.
# With fewer GPUs than ranks (but at least one), all ranks run on the CPU.
set -u

if [ "$#" -lt 2 ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
    echo "usage: $0 NUM_RANKS COMMAND [ARGUMENT ...]" >&2
    exit 2
fi
num_ranks=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export WORLD_SIZE=$num_ranks MASTER_ADDR=127.0.0.1
# A port that is free now; the first rank binds it a moment later.
MASTER_PORT=${MASTER_PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
export MASTER_PORT

# GPUs that CUDA would show a rank: the entries of CUDA_VISIBLE_DEVICES up to the first that names none, or all of them.
visible_gpus() {
    local num_gpus num_visible=0 entry entries
    num_gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
    if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
        echo "$num_gpus"
        return
    fi
    IFS=, read -r -a entries <<<"$CUDA_VISIBLE_DEVICES"
    for entry in "${entries[@]+"${entries[@]}"}"; do
        case $entry in
            GPU-* | MIG-*) ;;
            '' | *[!0-9]*) break ;;
            *) ((10#$entry < num_gpus)) || break ;;
        esac
        num_visible=$((num_visible + 1))
    done
    echo "$num_visible"
}

if command -v nvidia-smi >/dev/null; then
    num_gpus=$(visible_gpus)
    if ((0 < num_gpus && num_gpus < num_ranks)); then
        echo "$num_ranks ranks, but $num_gpus GPU(s) visible: the ranks run on the CPU" >&2
        export CUDA_VISIBLE_DEVICES=
    fi
fi

ranks=()
for ((rank = 0; rank < num_ranks; rank++)); do
    RANK=$rank LOCAL_RANK=$rank "$here/node.sh" "$@" &
    ranks+=("$!")
done

forward() {
    kill -s "$1" "${ranks[@]}" 2>/dev/null || true
}
trap 'forward TERM' TERM
trap 'forward TERM' INT
trap 'forward USR1' USR1

result=0
while ((${#ranks[@]} > 0)); do
    # Looking five times a second works on every bash and lets traps run in between.
    sleep 0.2
    alive=()
    failed=0
    for pid in "${ranks[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            alive+=("$pid")
            continue
        fi
        wait "$pid"
        code=$?
        ((code != 0)) && failed=$code
    done
    ranks=("${alive[@]+"${alive[@]}"}")
    # The first failure is the cause; the codes of ranks that it took along are not.
    ((result == 0)) && result=$failed
    if ((failed != 0 && ${#ranks[@]} > 0)); then
        echo "a rank ended with code $failed; ending the other ${#ranks[@]} in 5 seconds" >&2
        sleep 5
        forward KILL
    fi
done
exit "$result"
