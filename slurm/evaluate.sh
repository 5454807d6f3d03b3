#!/usr/bin/env bash
#SBATCH --job-name=megamm-evaluate
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Score a run, or an exported folder, on its held-out data. Arguments go to `megamm evaluate`:
#   sbatch slurm/evaluate.sh /shared/runs/1b
set -uo pipefail

# Slurm runs a copy of this file: the checkout is where MEGAMM_HOME says, or the folder that the job was submitted from.
export MEGAMM_HOME=${MEGAMM_HOME:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
# shellcheck source=common.sh
source "$MEGAMM_HOME/slurm/common.sh" || exit 2
begin_job

launch --ntasks=1 -- megamm evaluate "$@"
end_with "$?"
