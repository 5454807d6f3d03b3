#!/usr/bin/env bash
#SBATCH --job-name=megamm-tokenize
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Make a recipe's tokenizer from its shards, then the planned lengths of all of them, so that no GPU waits for either.
# Arguments go to `megamm tokenizer` and `megamm data plan-lengths`; what is there already is kept:
#   sbatch slurm/tokenize.sh 1b --data.root /shared/data
set -uo pipefail

# Slurm runs a copy of this file: the checkout is where MEGAMM_HOME says, or the folder that the job was submitted from.
export MEGAMM_HOME=${MEGAMM_HOME:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
# shellcheck source=common.sh
source "$MEGAMM_HOME/slurm/common.sh" || exit 2
begin_job

launch --ntasks=1 -- megamm tokenizer "$@" && launch --ntasks=1 -- megamm data plan-lengths "$@"
end_with "$?"
