#!/usr/bin/env bash
#SBATCH --job-name=megamm-export
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Write a run as a Hugging Face folder, proven to give what was trained. Arguments go to `megamm export`:
#   sbatch slurm/export.sh /shared/runs/1b --output /shared/exports/1b
set -uo pipefail

# Slurm runs a copy of this file: the checkout is where MEGAMM_HOME says, or the folder that the job was submitted from.
export MEGAMM_HOME=${MEGAMM_HOME:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
# shellcheck source=common.sh
source "$MEGAMM_HOME/slurm/common.sh" || exit 2
begin_job

output=$(option_of --output "$@")
if [ "$restart" -gt 0 ] && [ -e "$output/parity.json" ]; then
    # The folder gets its name when it is whole: an earlier start of this job finished it and was lost before it could say so.
    say "$output is written"
    exit 0
fi
launch --ntasks=1 -- megamm export "$@"
end_with "$?"
