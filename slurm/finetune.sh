#!/usr/bin/env bash
#SBATCH --job-name=megamm-finetune
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Tune a trained model further, whole, in parts or through an adapter: pretrain.sh with a start.
# Options before the script go to sbatch, arguments after it to `megamm finetune`:
#   sbatch --nodes 2 slurm/finetune.sh /shared/runs/tiny tiny_lora --run /shared/runs/tuned
# It requeues itself, goes on and ends as pretrain.sh does.
set -uo pipefail

# Slurm runs a copy of this file: the checkout is where MEGAMM_HOME says, or the folder that the job was submitted from.
export MEGAMM_HOME=${MEGAMM_HOME:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
if [ "$#" -lt 2 ] || [[ $1 == -* || $2 == -* ]]; then
    echo "finetune.sh: say what the run starts from and its recipe: sbatch slurm/finetune.sh SOURCE RECIPE [--run RUN]" >&2
    exit 2
fi
training_words=(finetune "$1")
shift
# shellcheck source=pretrain.sh
source "$MEGAMM_HOME/slurm/pretrain.sh"
