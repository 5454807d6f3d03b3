#!/usr/bin/env bash
# What every rank runs, however it was started (local.sh, torchrun.sh, srun): ranks from the launcher, then the command.
set -euo pipefail

# srun says who we are in its own words.
if [ -z "${RANK:-}" ] && [ -n "${SLURM_PROCID:-}" ]; then
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
fi

if [ "${WORLD_SIZE:-1}" -gt 1 ]; then
    # One thread a rank unless the site says otherwise: ranks that share cores wait for each other.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
fi
# glibc keeps freed tensors mapped otherwise (about 18 % more resident memory), and reads these only when a process starts.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-262144} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-131072}
# One warning a collective otherwise (torch's deprecation of a function that DeepSpeed calls).
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
# A rank that fails must not leave its peers in a collective for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}

exec "$@"
