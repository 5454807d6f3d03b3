#!/usr/bin/env bash
# What every rank runs, however it was started (local.sh, torchrun.sh, deepspeed.sh, srun): ranks from the launcher, then the command.
set -euo pipefail

# srun says who we are in its own words.
if [ -z "${RANK:-}" ] && [ -n "${SLURM_PROCID:-}" ]; then
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
fi

# A shell that ssh or a container opened knows nothing of the environment that the launcher was called in.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -n "${MEGAMM_VENV:-}" ]; then
    PATH=$MEGAMM_VENV/bin:$PATH
elif ! command -v megamm >/dev/null && [ -d "$here/../.venv/bin" ]; then
    PATH=$here/../.venv/bin:$PATH
fi

if [ "${WORLD_SIZE:-1}" -gt 1 ]; then
    # One thread a rank unless the site says otherwise: ranks that share cores wait for each other.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
fi
# What glibc gives back at once costs page faults when it is taken again: with small thresholds a step on the CPU takes twice as long and a
# tenth less memory. 32 MiB is the most that glibc takes; it reads these only when a process starts.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-134217728}
# One warning a collective otherwise (torch's deprecation of a function that DeepSpeed calls).
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}

if [ -n "${MEGAMM_SCRATCH:-}" ]; then
    # Its last part alone is made: where a disk is not mounted no folder of the system's disk is to take its place.
    mkdir "$MEGAMM_SCRATCH" 2>/dev/null || true
    export TMPDIR=$MEGAMM_SCRATCH
    # Python would take /tmp without a word. The checks of nodes say it with the node's name, and of all nodes at once.
    if [ "${2:-}" != preflight ] && ! { [ -d "$MEGAMM_SCRATCH" ] && [ -w "$MEGAMM_SCRATCH" ]; }; then
        echo "megamm: MEGAMM_SCRATCH=$MEGAMM_SCRATCH cannot be written on ${SLURMD_NODENAME:-$HOSTNAME};" \
            "make it on every node, or name another folder in the site's settings" >&2
        exit 2
    fi
fi

exec "$@"
