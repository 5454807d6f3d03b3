#!/usr/bin/env bash
# What the scripts of this folder share: functions only, sourced by each of them.
#
# Variables that the functions leave: `job` (this job's name for scontrol), `restart` (how often it was requeued), `asked` (not empty after
# a signal), `fruitless` (restarts in a row without progress).

# --- messages --------------------------------------------------------------------------------------------------------

say() {
    echo "${SLURM_JOB_NAME:-megamm}: $*" >&2
}

# Nothing was started: what the words or the settings say cannot be run.
refuse() {
    say "$*"
    exit 2
}

# --- the site and the job --------------------------------------------------------------------------------------------

# Settings of the site, exported: MEGAMM_SITE or slurm/site.env (see site.env.example). Without one the defaults hold.
load_site() {
    local site=${MEGAMM_SITE:-$MEGAMM_HOME/slurm/site.env}
    if [ ! -e "$site" ]; then
        [ -z "${MEGAMM_SITE:-}" ] || refuse "MEGAMM_SITE=$site is not there; copy slurm/site.env.example and name the copy"
        return
    fi
    # Sites' own files, here and behind `module`, take unset variables for empty.
    set -a +u
    # shellcheck source=/dev/null
    source "$site" || refuse "$site failed; it is read by bash, one NAME=value a line"
    set +a -u
}

# First call of every job: signals, site, modules, programs. Traps come first, because USR1 would end the shell.
begin_job() {
    asked="" step="" pass_on=TERM
    trap 'pass_signal' USR1 TERM
    # An array's first task carries the number of the whole array, which scontrol would take for all tasks.
    job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    restart=${SLURM_RESTART_COUNT:-0}
    MEGAMM_HOME=$(cd "$MEGAMM_HOME" && pwd)
    load_site
    if [ -n "${MEGAMM_MODULES:-}" ]; then
        load_modules
    fi
    # The code beside this file runs, whatever else the environment has installed.
    export PYTHONPATH=$MEGAMM_HOME${PYTHONPATH:+:$PYTHONPATH}
    # srun does not inherit the first since Slurm 22.05, and takes one of the two.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_GPU:-1}}
    unset SLURM_CPUS_PER_GPU
    # Of a step that srun itself cannot make, on a node that is just coming back: more than any task's own code, so that it is tried again.
    export SLURM_EXIT_ERROR=250
    # Warnings name the cause of most failures; more than that floods the logs of many ranks.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    if [ -n "${MEGAMM_INTERFACE:-}" ]; then
        # With several networks NCCL and gloo may pick one that does not reach the other nodes.
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$MEGAMM_INTERFACE} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$MEGAMM_INTERFACE}
    fi
}

load_modules() {
    local modules
    read -ra modules <<<"$MEGAMM_MODULES"
    set +u
    # shellcheck source=/dev/null
    command -v module >/dev/null || source /etc/profile
    module load "${modules[@]}" || refuse "module load $MEGAMM_MODULES failed; mend MEGAMM_MODULES in the site's settings"
    set -u
}

# One field of what scontrol says about this job; nothing where the controller does not answer.
job_field() {
    scontrol show job --oneliner "$job" 2>/dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p"
}

# Where ranks meet: the first node's address (compute nodes need not resolve each other's names), and a port of this job and restart.
# A job has four ports below the range that systems hand out by themselves: what an earlier start left open is in nobody's way.
#   rendezvous OFFSET     0 for training, 1 for what runs before it
rendezvous() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR=${MASTER_ADDR:-$first}
    export MASTER_PORT=$((15000 + (SLURM_JOB_ID * 4 + restart % 2 * 2 + $1) % 16000))
}

# Options of srun, into `tasks`, for one task a GPU on all nodes that this start has.
a_task_a_gpu() {
    local gpus=${SLURM_GPUS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
    # A type may stand before the number.
    gpus=${gpus##*:}
    if [ "$gpus" != "${SLURM_NTASKS_PER_NODE:-$gpus}" ]; then
        refuse "--gpus-per-node=$gpus with --ntasks-per-node=$SLURM_NTASKS_PER_NODE: one task a GPU, so leave --ntasks-per-node out"
    fi
    # In blocks, whatever the site's default is: rank 0 belongs to the first node, whose address MASTER_ADDR is.
    # shellcheck disable=SC2034  # for whoever asked
    tasks=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * gpus))" --ntasks-per-node="$gpus" --distribution=block)
}

# The last value of an option among words, as `--run DIR` or `--run=DIR`.
#   option_of --run WORD ...
option_of() {
    local name=$1 value=""
    shift
    while [ "$#" -gt 0 ]; do
        case $1 in
            "$name") value=${2:-} ;;
            "$name"=*) value=${1#*=} ;;
        esac
        shift
    done
    echo "$value"
}

# The overrides of recipe keys among words, `--optim.lr 2e-4` or `--optim.lr=2e-4`, into `overrides`: what other commands take as well.
#   overrides_of WORD ...
overrides_of() {
    overrides=()
    while [ "$#" -gt 0 ]; do
        if [[ ${1%%=*} == --*.* ]]; then
            overrides+=("$1")
            if [[ $1 != *=* && "$#" -gt 1 ]]; then
                overrides+=("$2")
                shift
            fi
        fi
        shift
    done
}

# All variables of this start in a file, without what is secret.
#   dump_environment FILE
dump_environment() {
    local entry name value
    while IFS= read -r -d '' entry; do
        name=${entry%%=*} value=${entry#*=}
        case ${name^^} in
            *TOKEN* | *KEY* | *SECRET* | *PASS* | *CREDENTIAL* | *JWT*) value='***' ;;
        esac
        printf '%s=%q\n' "$name" "$value"
    # Proxies and registries carry user:password@ in their addresses.
    done < <(env -0 | sort -z) | sed -E 's#://[^/@]+@#://***@#g' >"$1"
}

# --- steps -----------------------------------------------------------------------------------------------------------

# Run a command as a step of this job, through node.sh and the site's container, and return its code.
#   launch SRUN_OPTION ... -- COMMAND [ARGUMENT ...]
launch() {
    local options=() inside=() code
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    container
    # Plugins that cannot bind print a complaint for every step. (grep reads to the end: a pipe that breaks would count as a no.)
    if scontrol show config 2>/dev/null | grep -E '^TaskPlugin .*(affinity|cgroup)' >/dev/null; then
        options+=("--cpu-bind=${MEGAMM_CPU_BIND:-cores}")
    fi
    # A task that fails takes the others along at once, one that is done those that are not some minutes later: without it they might wait
    # for each other until the job's time is up.
    srun --kill-on-bad-exit=1 --wait=300 "${options[@]}" "${inside[@]}" "$MEGAMM_HOME/launchers/node.sh" "$@" &
    step=$!
    [ -z "$asked" ] || pass_signal
    # A trap runs only between commands, so srun is in the background and the shell waits for it again after each signal.
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
    done
    wait "$step"
    code=$?
    step=""
    return "$code"
}

# USR1 (the time limit is near) and TERM go to the step as `pass_on` says.
pass_signal() {
    asked=yes
    [ -z "$step" ] || kill -s "$pass_on" "$step" 2>/dev/null
}

# Words of the site's container, into `options` (srun's) and `inside` (what comes before the command).
# shellcheck disable=SC2154  # both belong to launch
container() {
    [ -n "${MEGAMM_CONTAINER:-}" ] || return 0
    local mounts=$MEGAMM_HOME:$MEGAMM_HOME,$PWD:$PWD folder program
    for folder in "${run:-}" "${MEGAMM_SCRATCH:-}" "${MEGAMM_VENV:-}"; do
        [ -z "$folder" ] || mounts+=,$(realpath "$folder"):$(realpath "$folder")
    done
    mounts+=${MEGAMM_CONTAINER_MOUNTS:+,$MEGAMM_CONTAINER_MOUNTS}
    if [[ $MEGAMM_CONTAINER == *.sif ]]; then
        program=$(command -v apptainer || command -v singularity) ||
            refuse "MEGAMM_CONTAINER=$MEGAMM_CONTAINER needs apptainer, which is not on PATH; load it with MEGAMM_MODULES"
        inside=("$program" exec --nv --bind "$mounts" --pwd "$PWD" "$MEGAMM_CONTAINER")
    else
        srun --help | grep -e --container-image >/dev/null ||
            refuse "MEGAMM_CONTAINER=$MEGAMM_CONTAINER needs pyxis, which this srun does not have; name a .sif for apptainer"
        options+=("--container-image=$MEGAMM_CONTAINER" "--container-mounts=$mounts" "--container-workdir=$PWD")
    fi
}

# Check all nodes of this job, one task a GPU, and return 0 where they may train, else the code of a task. Where some may not, `bad_nodes`
# names them, as Slurm does and with commas between; it is empty where the checks themselves failed. What was seen is in
# logs/preflight.json of the folder.
#   check_nodes FOLDER SRUN_OPTION ... -- RECIPE [OVERRIDE ...]
check_nodes() {
    local report=$1/logs/preflight.json options=() code
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    rm -f "$report"
    bad_nodes=""
    # In the order of ranks: containers have no scontrol, and who does not come cannot say its name.
    MEGAMM_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd ' ')
    export MEGAMM_NODES
    rendezvous 1
    # A task that cannot even start must not take along those that would name its node; all of them come to an end by themselves.
    launch "${options[@]}" --kill-on-bad-exit=0 --wait=900 -- megamm preflight "$@" --output "$report"
    code=$?
    # The report names nodes, not the code: srun ends the tasks that are left, and then returns their codes.
    if [ "$code" -ne 0 ] && [ -e "$report" ]; then
        # shellcheck disable=SC2034  # for whoever asked
        bad_nodes=$(python3 -c 'import json, sys; print(",".join(json.load(open(sys.argv[1]))["bad_nodes"]))' "$report")
    fi
    return "$code"
}

# --- starting again --------------------------------------------------------------------------------------------------

# Set `fruitless`: starts of this job in a row, after the first, that began where the one before began.
#   count_fruitless FILE PROGRESS     PROGRESS is one word
count_fruitless() {
    local last_job last_progress num
    fruitless=0
    # Slurm's own requeues count as well; a new submission has another number and starts at 0.
    if read -r last_job last_progress num <"$1" && [ "$last_job $last_progress" = "$job $2" ]; then
        fruitless=$((num + 1))
    fi 2>/dev/null
    echo "$job $2 $fruitless" >"$1"
}

# Whether scontrol's complaint is of a controller that is away or busy, rather than of one that refuses.
is_away() {
    grep -Eqi 'contact|timed out|zero bytes|standby|temporar' <<<"$1"
}

# scontrol, again while the controller is away or busy: a job that was held and not released would wait for ever.
#   tell WORD ...
tell() {
    local try complaint
    for try in 1 2 3 4 5; do
        complaint=$(scontrol "$@" 2>&1) && return
        is_away "$complaint" || break
        sleep "${MEGAMM_REQUEUE_WAIT_S:-3}"
    done
    say "scontrol $1 at attempt $try: $complaint"
    return 1
}

# Put this job back into the queue under its number, and end with it. Returns where it is not to run again, or cannot.
requeue() {
    local state restarts try complaint
    trap '' TERM USR1
    for try in 1 2 3 4 5 6 7 8 9 10; do
        state=$(job_field JobState) restarts=$(job_field Restarts)
        case $restarts:$state in
            "$restart:RUNNING")
                complaint=$(scontrol requeue "$job" 2>&1) && wait_for_the_end
                # As under --no-requeue: whoever said that has the nodes back at once.
                if ! is_away "$complaint"; then
                    say "Slurm does not requeue this job: $complaint"
                    return
                fi
                ;;
            :* | *:) ;;
            # What was left behind a cut cable hears, once it is mended, of the next start, which is not to be disturbed.
            # Somebody cancelled it, and requeue would bring it back; or Slurm requeues it already.
            *) return ;;
        esac
        say "no requeue at attempt $try (the controller says ${state:-nothing})"
        sleep "${MEGAMM_REQUEUE_WAIT_S:-20}"
    done
}

# End a job whose work starts anew each time. What was killed (a preemption with grace, a lost task) is tried again, two times.
#   end_with CODE
end_with() {
    if [ "$1" -gt 128 ] && [ "$restart" -lt 2 ]; then
        requeue
    fi
    exit "$1"
}

# The fewest nodes that this job may have. What a job that runs shows is the number that it has got; what was asked for stands apart.
min_nodes() {
    local asked_for
    asked_for=$(job_field ReqTRES)
    # Before Slurm 23.02 only this told it, and always of everybody's jobs.
    asked_for=${asked_for:-$(squeue --json 2>/dev/null | python3 -c '
import json, sys
print(next(job["tres_req_str"] for job in json.load(sys.stdin)["jobs"] if str(job["job_id"]) == sys.argv[1]))' "$SLURM_JOB_ID" 2>/dev/null)}
    [[ $asked_for =~ (^|,)node=([0-9]+) ]] && echo "${BASH_REMATCH[2]}"
}

# Whether Slurm could give this job as many nodes as it needs besides some, now or later: it lets one wait for ever that it cannot.
#   leaves_enough NODE,NODE...
leaves_enough() {
    local num features required request answer
    # A job waits for each node that it names itself.
    required=$(job_field ReqNodeList)
    if [ "${required:-(null)}" != "(null)" ] &&
        scontrol show hostnames "$required" | grep -Fxf <(scontrol show hostnames "$1") >/dev/null; then
        return 1
    fi
    # Where nobody tells, one may do.
    num=$(min_nodes) || num=1
    request=(--nodes="$num" --exclude="$1" --partition="$SLURM_JOB_PARTITION")
    [ -z "${SLURM_GPUS_PER_NODE:-}" ] || request+=(--gpus-per-node="$SLURM_GPUS_PER_NODE")
    features=$(job_field Features)
    [ "${features:-(null)}" = "(null)" ] || request+=(--constraint="$features")
    answer=$(sbatch --test-only "${request[@]}" --wrap true 2>&1)
    # Answers of other kinds, such as an account that has to be named, say nothing of nodes.
    [[ $answer != *"node configuration is not available"* ]]
}

# As requeue, on other nodes than these. Returns as well where Slurm has not enough others.
#   requeue_without NODE,NODE...
requeue_without() {
    local excluded state try
    trap '' TERM USR1
    for try in 1 2 3 4 5; do
        state=$(job_field Restarts):$(job_field JobState)
        [[ $state == :* || $state == *: ]] || break
        say "the controller says nothing at attempt $try"
        sleep "${MEGAMM_REQUEUE_WAIT_S:-20}"
    done
    [ "$state" = "$restart:RUNNING" ] || return
    excluded=$(job_field ExcNodeList)
    [ "$excluded" != "(null)" ] || excluded=""
    excluded=${excluded:+$excluded,}$1
    if ! leaves_enough "$excluded"; then
        say "Slurm has not enough nodes without $excluded"
        return
    fi
    # Nodes of a running job cannot be changed, those of a held one can: Slurm ends this shell only KillWait seconds after its TERM.
    tell requeuehold "$job" || return
    tell update "JobId=$job" "ExcNodeList=$excluded" || say "$1 could not be excluded"
    tell release "$job"
    wait_for_the_end
}

# Slurm ends the shell of a requeued job; to leave before it does would end the job instead.
wait_for_the_end() {
    sleep "${MEGAMM_REQUEUE_WAIT_S:-120}"
    exit 75
}
