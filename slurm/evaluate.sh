#!/usr/bin/env bash
#SBATCH --job-name=megamm-evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Score a run, or an exported folder, on its held-out data, which the tasks share, one a GPU. Options before the script go to sbatch,
# arguments after it to `megamm evaluate`:
#   sbatch --gpus-per-node=8 slurm/evaluate.sh /shared/runs/1b
set -uo pipefail

# Slurm runs a copy of this file: the checkout is where MEGAMM_HOME says, or the folder that the job was submitted from.
export MEGAMM_HOME=${MEGAMM_HOME:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
# shellcheck source=common.sh
source "$MEGAMM_HOME/slurm/common.sh" || exit 2
begin_job

a_task_a_gpu
rendezvous 0
# The first rank makes the report when the others are gone, however long that takes.
launch "${tasks[@]}" --wait=0 -- megamm evaluate "$@"
end_with "$?"
