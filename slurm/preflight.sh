#!/usr/bin/env bash
#SBATCH --job-name=megamm-preflight
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --time=00:20:00
#SBATCH --output=%x-%j.out
# Check nodes without training on them, one task a GPU: bad ones are named, and the job fails. Arguments go to `megamm preflight`:
#   sbatch --nodes 16 slurm/preflight.sh 1b --run /shared/runs/1b
# With several nodes pretrain.sh does the same first, and starts again without the bad ones.
set -uo pipefail

# Slurm runs a copy of this file: the checkout is where MEGAMM_HOME says, or the folder that the job was submitted from.
export MEGAMM_HOME=${MEGAMM_HOME:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
# shellcheck source=common.sh
source "$MEGAMM_HOME/slurm/common.sh" || exit 2
begin_job

folder=$PWD/preflight-$SLURM_JOB_ID
mkdir -p "$folder/logs" || exit 1
a_task_a_gpu
check_nodes "$folder" "${tasks[@]}" --output="$folder/logs/task-%t.log" -- "$@" && exit 0
say "bad: ${bad_nodes:-the checks themselves}; see $folder/logs"
exit 1
