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

newest_checkpoint() {
    local folder newest=none
    for folder in "$run"/checkpoints/step_[0-9]*; do
        # step_00000100.damaged-1 is one that was set aside: no progress.
        [ -d "$folder" ] && [[ ${folder##*/} != *.* ]] && newest=${folder##*/}
    done
    echo "$newest"
}

# Restarts in a row that began where the one before began. Slurm's own requeues (a lost node) count too; a new submission starts at 0.
record=$run/.last_checkpoint
begin=$(newest_checkpoint)
last="" fruitless=0
if [ "$restart" -gt 0 ] && [ -e "$record" ]; then
    read -r last fruitless <"$record"
    if [ "$last" = "$begin" ]; then
        fruitless=$((fruitless + 1))
    else
        fruitless=0
    fi
fi
echo "$begin $fruitless" >"$record"
give_up="giving up: 2 restarts brought no checkpoint after $begin; see $run/logs, then submit again"
if [ "$fruitless" -gt 2 ]; then
    echo "$give_up" >&2
    exit 75
fi

# Set before srun starts, so that an early signal does not end this shell. Both go on as USR1: on TERM srun kills its tasks at once.
step="" asked=""
forward() {
    asked=yes
    [ -n "$step" ] && kill -USR1 "$step" 2>/dev/null
}
trap forward USR1 TERM

# What an earlier attempt left must not speak for this one, which may fail before it gets to clear it.
rm -f "$run/INTERRUPTED"
srun --kill-on-bad-exit=1 --wait=60 --output="$run/logs/job-%j-restart-$restart-task-%t.log" \
    "$home/launchers/node.sh" megamm pretrain "$recipe" "${arguments[@]}" &
step=$!
[ -n "$asked" ] && forward

# A trap runs only between commands, so srun is in the background and the shell waits for it again after each signal.
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
done

# Markers say how the run ended; exit codes of srun do not.
if [ -e "$run/DONE" ]; then
    exit 0
fi
reason=""
if [ -e "$run/INTERRUPTED" ]; then
    reason=$(sed -n 's/.*"reason": *"\([^"]*\)".*/\1/p' "$run/INTERRUPTED")
fi
case $reason in
    SIGUSR1 | SIGTERM) ;;
    # Whoever wrote STOP or set stop_after wants the run to rest; a run that failed would fail again.
    *) exit 75 ;;
esac
if [ "$fruitless" -ge 2 ] && [ "$(newest_checkpoint)" = "$begin" ]; then
    echo "$give_up" >&2
    exit 75
fi
state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([^ ]*\).*/\1/p')
# A cancelled job must stay cancelled: requeue would bring it back.
if [ "$state" = RUNNING ]; then
    trap '' TERM
    # Slurm ends this shell; to leave before it does would end the job instead.
    scontrol requeue "$SLURM_JOB_ID" && sleep "${MEGAMM_REQUEUE_WAIT_S:-60}"
fi
exit 75
