#!/usr/bin/env bash
#SBATCH --job-name=megamm-prepare
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
# Write shards from a raw source, one part of them in each task of an array. Arguments go to `megamm prepare`:
#   sbatch --array=0-63 slurm/prepare.sh image_folder /raw/flowers --output data/flowers
# The same command again reruns the parts that failed, and those alone. A few parts by number, as --array=3,7, need MEGAMM_PARTS=64.
set -uo pipefail

# Slurm runs a copy of this file: the checkout is where MEGAMM_HOME says, or the folder that the job was submitted from.
export MEGAMM_HOME=${MEGAMM_HOME:-${SLURM_SUBMIT_DIR:?submit this file with sbatch}}
# shellcheck source=common.sh
source "$MEGAMM_HOME/slurm/common.sh" || exit 2
begin_job

output=$(option_of --output "$@")
[ -n "$output" ] || refuse "name the folder for the shards with --output"
part=${SLURM_ARRAY_TASK_ID:?submit this file as an array, such as --array=0-7}
parts=${MEGAMM_PARTS:-$SLURM_ARRAY_TASK_COUNT}
if [ -z "${MEGAMM_PARTS:-}" ] && [ "$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX" != "0-$((parts - 1))" ]; then
    refuse "an array that is not 0-N does not say how many parts there are; set MEGAMM_PARTS, such as 8 for --array=0-7"
fi

journal=$output/.prepare
mkdir -p "$journal" || exit 1
of=$part-of-$parts
mark=$journal/part-$of.done
words=$(printf '%q ' "$@")

# Done by these same words, and for the shards that are there: what the part was made from is written anew where they are.
is_done() {
    local facts newer=no
    [ "$(cat "$mark" 2>/dev/null)" = "$words" ] || return 1
    for facts in "$journal"/*.json; do
        [ "$mark" -nt "$facts" ] || return 1
        newer=yes
    done
    [ "$newer" = yes ]
}

# Finished shards of this part.
num_finished() {
    cat "$journal"/*.part-"$of".jsonl 2>/dev/null | wc -l
}

if is_done; then
    say "part $part of $parts is done"
    exit 0
fi
begin=$(num_finished)
count_fruitless "$journal/part-$of.restarts" "$begin"

more=()
[ -n "$(option_of --workers "$@")" ] || more+=(--workers "${SLURM_CPUS_PER_TASK:-1}")
launch --ntasks=1 -- megamm prepare "$@" "${more[@]}" --part "$part/$parts"
code=$?
if [ "$code" -eq 0 ]; then
    echo "$words" >"$mark"
    rm -f "$journal/part-$of.restarts"
    exit 0
fi
if [ -n "$asked" ] || [ "$code" -gt 128 ]; then
    # Out of time, or killed: finished shards stay, the rest is for the next start.
    if [ "$fruitless" -ge 2 ] && [ "$(num_finished)" = "$begin" ]; then
        say "giving up: 2 restarts finished no shard of part $part; give it more --time, or smaller shards"
    else
        requeue
    fi
    exit 75
fi
exit "$code"
