#!/usr/bin/env bash
# How a job ended, from its logs:  scripts/slurm/state.sh LOG_DIR [JOB_LOG]
# One of: completed, time limit, preempted, cancelled, out of memory, hang, failed, running or killed.
# A failure is followed by the first traceback of the first rank that failed.
set -euo pipefail
logs="$1"
files=("${logs}"/node_*.log)
[ -e "${files[0]}" ] || files=()
[ $# -lt 2 ] || files+=("$2")
code="$(cat "${logs}/exit_code" 2>/dev/null || echo none)"

says() { [ ${#files[@]} -gt 0 ] && grep -qE "$1" "${files[@]}"; }

# The first traceback per rank in order of appearance; one that is not the mere echo of another rank's end is
# preferred. Without a traceback: Megatron's or our refusal, or the last line.
first_failure() {
    local echoes='losed by peer|reset by peer|Broken pipe|DistNetworkError|remote process exited'
    echoes+='|SignalException|ChildFailedError'
    [ ${#files[@]} -gt 0 ] || echo "no log in ${logs}"
    cat "${files[@]}" /dev/null | awk -v echoes="${echoes}" '
        {
            rank = "?"
            while (match($0, /^\[rank[0-9]+\]: ?/)) {
                rank = substr($0, 6, index($0, "]") - 6)
                $0 = substr($0, RLENGTH + 1)
            }
        }
        /^helix_megatron[.a-z_]*: / && !refusal { refusal = $0 }
        NF { last = $0 }
        /^Traceback / && !(rank in text) { open[rank] = 1; order[++n] = rank }
        open[rank] {
            text[rank] = text[rank] "\n" $0
            if ($0 ~ /^[A-Za-z_.]+(:|$)/) { # the line that names the exception; those above it are indented
                open[rank] = 0
                echo[rank] = $0 ~ echoes
            }
        }
        END {
            if (refusal) { print refusal; exit }
            for (i = 1; i <= n && !found; i++) if (!echo[order[i]]) found = order[i]
            if (n && found == "") found = order[1]
            if (n) print "first failure, rank " found ":" text[found]; else print last
        }'
}

if [ "${code}" = 0 ] && [ ! -e "${logs}/stopped" ] && ! says '^helix: node [0-9]+ received'; then
    echo completed
elif says 'DUE TO TIME LIMIT|^helix: node [0-9]+ received USR1'; then
    echo "time limit$(says 'exiting program after receiving' && echo ', saved')"
elif says 'DUE TO PREEMPTION'; then
    echo preempted
elif [ -e "${logs}/stopped" ] || says 'JOB .*CANCELLED AT'; then # a STEP is cancelled after any failure
    echo "cancelled$(says 'exiting program after receiving' && echo ', saved')"
elif says 'out of memory|OutOfMemoryError|oom[-_ ]kill|Cannot allocate memory|MemoryError|bad_alloc'; then
    echo "out of memory, $(first_failure)"
elif says 'collective operation timeout|Timed out waiting|wait timeout after|still running of'; then
    echo "hang, $(first_failure)"
elif [ "${code}" = none ]; then
    echo "running or killed"
else
    echo "failed (exit code ${code}), $(first_failure)"
fi
