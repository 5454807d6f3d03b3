#!/usr/bin/env bash
#SBATCH --job-name=megamm-pretrain
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Pretrain, one task a GPU, through as many jobs' worth of time as it takes: the job requeues itself until the run is done.
# Options before the script go to sbatch, arguments after it to `megamm pretrain`:
#   sbatch --nodes 16 slurm/pretrain.sh 1b --run /shared/runs/1b --optim.lr 2e-4
# With a range, --nodes 12-16, it goes on with as many of them as there are. (No --ntasks-per-node: Slurm would remember the tasks of the
# first start, and wait for nodes for all of them.)
# Exit codes: 0 the run is done; 75 it is not, and somebody has to look; 2 it cannot be started so.
set -uo pipefail

# Slurm runs a copy of this file: the checkout is where MEGAMM_HOME says, or the folder that the job was submitted from.
export MEGAMM_HOME=${MEGAMM_HOME:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
# shellcheck source=common.sh
source "$MEGAMM_HOME/slurm/common.sh" || exit 2
begin_job

# finetune.sh says another command, and what it starts from.
training_words=("${training_words[@]-pretrain}")
recipe=${1:-tiny}
[[ $recipe != -* ]] || refuse "the recipe comes first, not $recipe: sbatch slurm/pretrain.sh RECIPE [--run RUN]"
shift || true
arguments=("$@")
run=$(option_of --run "$@")
if [ -z "$run" ]; then
    name=${recipe##*/}
    run=$PWD/runs/${name%.toml}
    arguments+=(--run "$run")
fi
if [ -e "$run/DONE" ]; then
    say "$run is done"
    exit 0
fi
mkdir -p "$run/logs" || exit 75
dump_environment "$run/logs/job-$SLURM_JOB_ID-restart-$restart.env"

newest_checkpoint() {
    local folder newest=none
    for folder in "$run"/checkpoints/step_[0-9]*; do
        # step_00000100.damaged-1 is one that was set aside: no progress.
        [ -d "$folder" ] && [[ ${folder##*/} != *.* ]] && newest=${folder##*/}
    done
    echo "$newest"
}

newest_error() {
    local file newest=none
    for file in "$run"/errors/start_*.json; do
        newest=$file
    done
    echo "$newest"
}

# Whether a rank of the newest start failed in a way that only somebody can mend: the recipe, the data, the disk. Records say so.
needs_somebody() {
    local start
    start=$(newest_error)
    start=${start##*/}
    grep -qs '"may_pass": *false' "$run/errors/${start%%.*}".*
}

# Whether a task of this start was refused before the run began: it says so in one line, and srun ends the others with a signal.
was_refused() {
    refusals | grep -vF '[may pass]' >/dev/null
}

# Whether such a task said that the same may work later.
may_pass() {
    refusals | grep -F '[may pass]' >/dev/null
}

# (What reads this reads it to the end: a pipe that breaks would count as a no.)
refusals() {
    grep -hsE '^megamm( \(rank [0-9]+\))?: ' "$run/logs/job-$SLURM_JOB_ID-restart-$restart-task-"*.log
}

give_up() {
    say "giving up: 2 restarts brought no checkpoint after $begin; see $run/logs and $run/errors, then submit again"
    exit 75
}

# Back into the queue, unless starts like this one bring nothing.
try_again() {
    if [ "$fruitless" -ge 2 ] && [ "$(newest_checkpoint)" = "$begin" ]; then
        give_up
    fi
    requeue
    exit 75
}

# The nodes did not pass: start again without the bad ones, where there are some and not all are.
#   leave_out CODE NODE,NODE...
leave_out() {
    local bad
    IFS=, read -ra bad <<<"$2"
    if [ -n "$asked" ]; then
        requeue
    elif [ "${#bad[@]}" -eq 0 ]; then
        say "the checks of the nodes failed; see $run/logs/job-$SLURM_JOB_ID-restart-$restart-preflight-*.log"
        # A task that was killed says nothing, and may have been the one that would have told. What is refused ends with a small code.
        [ "$1" -le 128 ] || try_again
    elif [ "${#bad[@]}" -ge "$SLURM_JOB_NUM_NODES" ]; then
        say "every node failed its checks, so the nodes may not be to blame; see $run/logs/preflight.json"
    else
        say "bad: $2; starting again without; see $run/logs/preflight.json"
        requeue_without "$2"
    fi
    exit 75
}

begin=$(newest_checkpoint)
excluded=$(job_field ExcNodeList)
# Leaving out a node that failed its checks is progress too: each can be left out once.
count_fruitless "$run/.last_checkpoint" "$begin,without:$excluded"
[ "$fruitless" -le 2 ] || give_up

# What an earlier start left must not speak for this one, which may fail before it gets to clear it.
rm -f "$run/INTERRUPTED"
last_error=$(newest_error)

a_task_a_gpu
log=$run/logs/job-%j-restart-$restart

if [ "${MEGAMM_PREFLIGHT:-$((SLURM_JOB_NUM_NODES > 1))}" = 1 ]; then
    overrides_of "${arguments[@]}"
    check_nodes "$run" "${tasks[@]}" --output="$log-preflight-%t.log" -- "$recipe" --run "$run" "${overrides[@]}" ||
        leave_out "$?" "$bad_nodes"
fi

# On TERM srun would kill its tasks at once; on USR1 they finish their step and commit a checkpoint.
pass_on=USR1
rendezvous 0
launch "${tasks[@]}" --output="$log-task-%t.log" -- megamm "${training_words[@]}" "$recipe" "${arguments[@]}"
code=$?

# Markers say how the run ended; exit codes of srun do not.
[ ! -e "$run/DONE" ] || exit 0
if [ -e "$run/INTERRUPTED" ]; then
    # A run that was told to rest (STOP, --stop-after, --max-seconds) says so.
    grep -q '"requeue": *true' "$run/INTERRUPTED" || exit 75
elif [ "$(newest_error)" = "$last_error" ]; then
    ! was_refused || exit 75
    # A rank that was killed says nothing; without that, it was refused before it began.
    [ "$code" -gt 128 ] || may_pass || exit 75
elif needs_somebody; then
    exit 75
fi
try_again
