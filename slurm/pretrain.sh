#!/usr/bin/env bash
#SBATCH --job-name=megamm-pretrain
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Pretrain on Slurm, one task a GPU. Options before the script go to sbatch, arguments after it to `megamm pretrain`:
#   sbatch --nodes 16 slurm/pretrain.sh 7b --run /shared/runs/7b --optim.lr 2e-4
# Set MEGAMM_HOME to the checkout and MEGAMM_VENV to its virtual environment where they are not the submit folder's.
set -uo pipefail

home=${MEGAMM_HOME:-$SLURM_SUBMIT_DIR}
venv=${MEGAMM_VENV:-$home/.venv}
recipe=${1:-tiny}
shift || true

run=""
arguments=("$@")
for ((i = 0; i < ${#arguments[@]}; i++)); do
    case ${arguments[i]} in
        --run) run=${arguments[i + 1]:-} ;;
        --run=*) run=${arguments[i]#--run=} ;;
    esac
done
if [ -z "$run" ]; then
    run=$SLURM_SUBMIT_DIR/runs/$recipe
    arguments+=(--run "$run")
fi

export PATH=$venv/bin:$PATH
# The first node's address, not its name: compute nodes need not resolve each other.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# srun does not inherit it since Slurm 22.05.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

mkdir -p "$run/logs"
restart=${SLURM_RESTART_COUNT:-0}
srun --kill-on-bad-exit=1 --wait=60 --output="$run/logs/job-%j-restart-$restart-task-%t.log" \
    "$home/launchers/node.sh" megamm pretrain "$recipe" "${arguments[@]}" &
step=$!

# A trap runs only between commands, so srun goes to the background and the shell waits for it again after each signal.
trap 'kill -USR1 "$step" 2>/dev/null' USR1 TERM
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
done

# Markers say how the run ended; exit codes of srun do not.
if [ -e "$run/DONE" ]; then
    exit 0
fi
if [ -e "$run/INTERRUPTED" ]; then
    state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([^ ]*\).*/\1/p')
    # A cancelled job must stay cancelled: requeue would bring it back.
    if [ "$state" = RUNNING ]; then
        trap '' TERM
        scontrol requeue "$SLURM_JOB_ID" && sleep 60
    fi
fi
exit 75
