# shellcheck shell=bash
# What a job of Riverrun does before and after training. Sourced by the batch script, which sets:
#   run_dir       the run folder, absolute
#   python        the interpreter that has Riverrun
#   nproc         ranks a node; empty: one a GPU
#   grace         seconds that ranks are given to save after a signal
#   max_restarts  how often the job may be requeued
#   chain         jobs of a chain, each of which goes on where the last one ended; 0: the job is requeued instead
#   check         1: every node is looked at before training
#   exclude       nodes that the user left out
#   link          which job of a chain this is, from 1
#
# The exit code of the job: 0 finished or stopped as asked; 85 saved but not started again; 86 a bad node, and no other
# start; else that of srun.

: "${run_dir:?}" "${python:?}" "${nproc?}" "${grace:?}" "${max_restarts:?}" "${chain:?}" "${check:?}" "${exclude?}"
: "${link:?}"

rr_early=0
trap 'rr_early=1' USR1 # until rr_begin has looked at what an earlier start left

rr_say() { printf '[riverrun %s] %s\n' "$(date +%FT%T)" "$*"; }

# A field of outcome.json, which holds one a line; empty: there is none.
rr_outcome() {
    sed -n "s/^ \"$1\": //p" "$run_dir/outcome.json" 2>/dev/null | sed -e 's/,$//' -e 's/^"\(.*\)"$/\1/'
}

# The step of the newest finished checkpoint; -1: there is none.
rr_newest_step() {
    local path name newest=-1
    for path in "$run_dir"/checkpoints/step_*; do
        name=${path##*/step_}
        [[ -d "$path" && "$name" =~ ^[0-9]+$ ]] && ((10#$name > newest)) && newest=$((10#$name))
    done
    echo "$newest"
}

# What the run was asked for: stop, requeue or nothing.
rr_asked() { cat "$run_dir/stop-request" 2>/dev/null; }

# Asks the run to save, leave and be started again. A stop is not overruled. The file appears whole or not at all.
rr_ask_for_requeue() {
    [[ "$(rr_asked)" == stop ]] && return
    printf requeue >"$run_dir/stop-request.$SLURM_JOB_ID" &&
        mv -f "$run_dir/stop-request.$SLURM_JOB_ID" "$run_dir/stop-request"
}

# SIGUSR1 comes ahead of the time limit (--signal) and of many preemptions.
rr_on_usr1() {
    rr_interrupted=1
    rr_say "SIGUSR1: preemption or the time limit is near; the run saves after its current step"
    rr_ask_for_requeue
}

# SIGTERM comes from scancel, or from a preemption that SLURM itself requeues: in neither case does this script do so.
rr_on_term() {
    rr_interrupted=1 rr_cancelled=1
    rr_say "SIGTERM: cancelled or preempted; what the ranks save before SLURM kills them is kept"
}

# Waits for a process whatever signals come meanwhile; leaves its exit code in `code`.
rr_wait() {
    local waited
    code=""
    while :; do
        rr_interrupted=0
        wait "$1"
        waited=$?
        # 127: the process was waited for already, and a signal came just after
        [[ $waited == 127 && -n "$code" ]] || code=$waited
        ((rr_interrupted)) || return 0
    done
}

# Names and values of the environment, without what looks like a secret.
rr_environment() {
    local name
    local secret='(secret|token|passw|pwd_|credential|cookie|auth|private|signature|session|key)'
    for name in $(compgen -e | sort); do
        [[ "${name,,}" =~ $secret || "${!name}" =~ ://[^/@[:space:]]+@ ]] || printf '%s=%q\n' "$name" "${!name}"
    done
}

rr_begin() {
    local asked
    restart=${SLURM_RESTART_COUNT:-0}
    rr_interrupted=0 rr_cancelled=0
    rr_first_step=$(rr_newest_step)
    rr_earlier=$(rr_outcome time)
    rr_say "job $SLURM_JOB_ID, start $((restart + 1)) on $SLURM_JOB_NODELIST, newest checkpoint: $rr_first_step (-1: none)"

    asked=$(rr_asked)
    if [[ "$(rr_outcome state)" == finished ]]; then
        rr_say "the run is finished: nothing to do. Launch it again with more train.steps to extend it"
        exit 0
    elif [[ "$asked" == stop ]]; then
        rr_say "the run was asked to stop: nothing to do. \`riverrun launch\` goes on with it"
        exit 0
    elif [[ -e "$run_dir/slurm/given-up" ]]; then
        rr_say "an earlier job gave up: $(cat "$run_dir/slurm/given-up"). Mend it; \`riverrun launch\` goes on"
        exit 1
    elif ((restart > max_restarts)); then
        rr_say "SLURM requeued this job $restart times, more than --max-restarts=$max_restarts; launch again to go on"
        exit 1
    fi
    rm -f "$run_dir/stop-request" # the request that ended the start before this one
    trap rr_on_usr1 USR1
    trap rr_on_term TERM
    ((rr_early)) && rr_on_usr1

    local head rr_address rr_port
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    rr_address=$(scontrol show node -o "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    rr_address=${rr_address:-$head}
    # above most services, below the ports that systems give away on their own
    rr_port=$((20000 + SLURM_JOB_ID % 12000))
    rr_logs="$run_dir/slurm/${SLURM_JOB_ID}_$restart"
    export RIVERRUN_RENDEZVOUS="$rr_address:$rr_port" RIVERRUN_LOGS="$rr_logs"
    export RIVERRUN_PYTHON="$python" RIVERRUN_NPROC="$nproc" RIVERRUN_GRACE="$grace"
    [[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # else srun takes one
    export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
    # NCCL: errors end a rank, and the last collectives are kept for the report of a hang
    export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}" NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
    mkdir -p "$rr_logs"
    rr_environment >"$rr_logs/env.txt"
    rr_say "rendezvous at $RIVERRUN_RENDEZVOUS; logs of the ranks in $rr_logs"
}

# Bad nodes are left out of the next start.
rr_check_nodes() {
    ((check)) || return 0
    srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 \
        "$python" -m riverrun.launch.cli doctor --slurm --dir "$run_dir" >"$rr_logs/doctor.txt" 2>&1 &
    rr_wait $!
    cat "$rr_logs/doctor.txt"
    ((rr_cancelled)) && exit 1
    ((code == 0)) && return 0
    local bad
    bad=$(sed -n 's/^bad node: \([A-Za-z0-9._-]*\).*/\1/p' "$rr_logs/doctor.txt" | sort -u)
    if [[ -z "$bad" ]]; then
        rr_give_up "riverrun doctor found a problem (exit code $code, see $rr_logs/doctor.txt)"
        rr_say "mend it, or launch with --no-check"
        exit 1
    fi
    rr_say "bad nodes: ${bad//$'\n'/ }"
    printf '%s\n' "$bad" | cat - "$run_dir/slurm/exclude" 2>/dev/null | sort -u >"$run_dir/slurm/exclude.$SLURM_JOB_ID"
    mv -f "$run_dir/slurm/exclude.$SLURM_JOB_ID" "$run_dir/slurm/exclude"
    if ((chain)); then
        rr_exclude_from_others
        rr_say "the next job of the chain runs without them"
        exit 86
    elif ((restart >= max_restarts)); then
        rr_say "this job was started $((restart + 1)) times, as often as it may (--max-restarts): launch it again"
        exit 86
    fi
    rr_requeue
}

# Requeues the job, without the nodes of slurm/exclude. SLURM ends this script meanwhile, which is why the signal is
# ignored here, and takes other nodes for pending jobs only, which this one is a moment later.
rr_requeue() {
    local nodes attempt
    trap '' TERM USR1
    scontrol requeue "$SLURM_JOB_ID" || {
        rr_say "SLURM refuses to requeue: launch with --chain N instead, or launch again to go on"
        exit 85
    }
    if [[ -s "$run_dir/slurm/exclude" ]]; then
        nodes=$(rr_excluded)
        for attempt in {1..100}; do
            if scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$nodes" 2>/dev/null; then
                rr_say "job $SLURM_JOB_ID will not run on $nodes (attempt $attempt)"
                break
            fi
            sleep 0.1
        done
    fi
    exit 0
}

rr_exclude_from_others() {
    local job
    while read -r job; do
        [[ "$job" == "$SLURM_JOB_ID" || "$job" == "${SLURM_ARRAY_JOB_ID:-}" ]] ||
            scontrol update JobId="$job" ExcNodeList="$(rr_excluded)" 2>/dev/null
    done <"$run_dir/slurm/jobs"
}

# The bad nodes that were found, and those that the user excluded, with commas.
rr_excluded() { { printf '%s\n' ${exclude:+"$exclude"}; cat "$run_dir/slurm/exclude"; } | paste -s -d, -; }

rr_give_up() {
    rr_say "giving up: $1"
    printf '%s\n' "$1" >"$run_dir/slurm/given-up"
}

# What becomes of the job after srun ended with code $1.
rr_end() {
    local srun_code=$1 state=none now
    now=$(rr_newest_step)
    if [[ "$(rr_outcome time)" != "$rr_earlier" ]]; then # else it is that of an earlier start
        state=$(rr_outcome state)
    fi
    rr_say "training ended: srun's exit code $srun_code, outcome: $state, checkpoint: step $now (-1: none)"
    [[ "$state" == none ]] || rr_say "$(rr_outcome message)"

    if [[ "$state" == finished ]]; then
        exit 0
    elif ((rr_cancelled)); then
        rr_say "not requeued by this script: cancelled, or requeued by SLURM itself"
        exit "$((srun_code ? srun_code : 1))"
    elif [[ "$state" == stopped && "$(rr_asked)" == stop ]]; then
        rr_say "stopped as asked; \`riverrun launch\` goes on with it"
        exit 0
    elif [[ "$state" == stopped ]]; then
        if ((now <= rr_first_step && !chain)); then
            rr_say "not requeued: no step was done since the start, so another start would do none either"
            exit 85
        fi
        rr_again "saved" 85
    fi

    srun_code=$((srun_code ? srun_code : 1))
    if [[ "$(rr_outcome exit_code)" == 2 && "$state" == failed ]]; then
        rr_give_up "$(rr_outcome message)"
        exit 2
    elif ((now <= rr_first_step)); then
        rr_give_up "job $SLURM_JOB_ID crashed without a checkpoint beyond step $rr_first_step, where it started"
        exit "$srun_code"
    fi
    rr_again "crashed, but came from step $rr_first_step to step $now" "$srun_code"
}

# Goes on in the next job, for reason $1; with exit code $2 if there is none.
rr_again() {
    if ((chain)); then
        if ((link < chain)); then
            rr_say "$1; job $((link + 1)) of $chain of the chain goes on"
            exit 0
        fi
        rr_say "$1; this was the last job of the chain: launch again to go on"
        exit "$2"
    elif ((restart >= max_restarts)); then
        rr_say "$1, but was requeued $restart times already (--max-restarts): launch again to go on"
        exit "$2"
    fi
    rr_say "$1: requeued"
    rr_requeue
}
