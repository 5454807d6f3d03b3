#!/usr/bin/env bash
# Submit scripts of this folder as a chain: each starts when all before it have succeeded, neighbouring `prepare`s run side by side.
# A stage is what follows `sbatch` elsewhere, with the script's bare name; `--` ends it. Run it where you would run sbatch:
#
#   slurm/pipeline.sh --array=0-63 prepare image_folder /raw/flowers --output data/flowers -- \
#       prepare text /raw/books --output data/books -- \
#       tokenize 1b -- \
#       --nodes 16 pretrain 1b --run runs/1b --optim.lr 2e-4 -- \
#       evaluate runs/1b -- \
#       export runs/1b --output exports/1b
#
# A job that is requeued keeps its number, so those after it go on waiting. When one fails for good, Slurm cancels those after it; the
# same command again does what is left. Nothing is submitted unless Slurm would take every stage.
set -euo pipefail

SLURM_JOB_NAME=pipeline
MEGAMM_HOME=${MEGAMM_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export MEGAMM_HOME
# shellcheck source=common.sh
source "$MEGAMM_HOME/slurm/common.sh"
load_site

stages="prepare tokenize pretrain evaluate export"
usage="usage: $0 [SBATCH_OPTION ...] STAGE [ARGUMENT ...] [-- ...]; stages are $stages"

is_stage() {
    [[ " $stages " == *" $1 "* ]]
}

# Cut one stage off the words: its name, what goes to sbatch before it, what goes to the script after it.
# `words` keeps the rest.
next_stage() {
    stage="" options=() arguments=()
    while [ "${#words[@]}" -gt 0 ]; do
        local word=${words[0]}
        words=("${words[@]:1}")
        if [ "$word" = -- ]; then
            break
        elif [ -n "$stage" ]; then
            arguments+=("$word")
        elif is_stage "$word"; then
            stage=$word
        else
            options+=("$word")
        fi
    done
    [ -n "$stage" ] || refuse "no stage in '${options[*]}'; $usage"
}

# Every stage is tried before the first is submitted.
words=("$@")
[ "$#" -gt 0 ] || refuse "$usage"
while [ "${#words[@]}" -gt 0 ]; do
    next_stage
    answer=$(sbatch --test-only "${options[@]}" "$MEGAMM_HOME/slurm/$stage.sh" "${arguments[@]}" 2>&1) || refuse "$stage: $answer"
done

submitted=()
trap '[ "${#submitted[@]}" -eq 0 ] || scancel "${submitted[@]}"' ERR
group=() waits_for="" before=""
words=("$@")
while [ "${#words[@]}" -gt 0 ]; do
    next_stage
    if [ "${#group[@]}" -gt 0 ] && ! [ "$stage $before" = "prepare prepare" ]; then
        waits_for=$(IFS=: && echo "${group[*]}")
        group=()
    fi
    number=$(sbatch --parsable --kill-on-invalid-dep=yes ${waits_for:+--dependency=afterok:$waits_for} "${options[@]}" \
        "$MEGAMM_HOME/slurm/$stage.sh" "${arguments[@]}")
    # A cluster's name may follow.
    number=${number%%;*}
    submitted+=("$number") group+=("$number") before=$stage
    echo "$number $stage ${arguments[*]}${waits_for:+ (after ${waits_for//:/, })}"
done
