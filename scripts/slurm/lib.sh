# shellcheck shell=bash
# What the job scripts share. Source me from the repository's root; docs/cluster.md lists the variables.
# One machine without Slurm is a cluster of one node: everything here works there too.

JOB_NAME="${SLURM_JOB_NAME:-${JOB_NAME:-helix}}"
NNODES="${SLURM_JOB_NUM_NODES:-1}"
RANKS_PER_NODE="${RANKS_PER_NODE:-8}"
HELIX_HOST_MODE="${HELIX_HOST_MODE:-0}"
PYTHON="${PYTHON:-python}"
# A requeued job keeps its number: every start has a folder of its own.
LOG_DIR="${LOG_DIR:-runs/jobs/${JOB_NAME}-${SLURM_JOB_ID:-$(date +%Y%m%d-%H%M%S)}}/${SLURM_RESTART_COUNT:-0}"
mkdir -p "${LOG_DIR}"

MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
MASTER_PORT="${MASTER_PORT:-$((10000 + ${SLURM_JOB_ID:-$$} % 20000))}"
if [ -n "${SLURM_JOB_ID:-}" ]; then
    _head="$(scontrol show hostnames "${SLURM_JOB_NODELIST}" | head -n 1)"
    # A node's name need not resolve; the address that Slurm itself uses does.
    MASTER_ADDR="$(scontrol show node "${_head}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
fi
export PYTHON MASTER_ADDR MASTER_PORT NNODES RANKS_PER_NODE HELIX_HOST_MODE
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

_container=()
if [ -n "${CONTAINER_IMAGE:-}" ]; then
    _container=("--container-image=${CONTAINER_IMAGE}" "--container-mounts=${CONTAINER_MOUNTS:-${PWD}:${PWD}}"
        "--container-workdir=${PWD}")
fi

_runner=""
_logs="${LOG_DIR}"
# Slurm tells the steps itself: here only wait for the ranks. Without Slurm pass it on.
trap 'touch "${_logs}/stopped"; [ -n "${SLURM_JOB_ID:-}" ] || kill -TERM "${_runner}"' TERM INT

# on_nodes NODES LOGS COMMAND...: COMMAND by node.sh once per node, output in LOGS/node_<number>.log
on_nodes() {
    local nodes="$1" logs="$2" status=0
    shift 2
    mkdir -p "${logs}"
    _logs="${logs}"
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        NNODES="${nodes}" srun --nodes="${nodes}" --ntasks="${nodes}" --ntasks-per-node=1 \
            --kill-on-bad-exit=1 --cpu-bind=none \
            --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}" \
            --output="${logs}/node_%n.log" "${_container[@]}" bash scripts/slurm/node.sh "$@" &
    else # a session of its own: Ctrl-C must not reach torchrun, which would end the ranks
        setsid bash scripts/slurm/node.sh "$@" >"${logs}/node_0.log" 2>&1 &
    fi
    _runner=$!
    while :; do # a trapped signal ends `wait`, not what it waits for
        status=0
        wait "${_runner}" || status=$?
        kill -0 "${_runner}" 2>/dev/null || break
    done
    echo "${status}" >"${logs}/exit_code"
    return "${status}"
}

# finish STATUS LOGS: say how it ended; with REQUEUE=1 go on after a time limit. Ends the script.
finish() {
    local state
    state="$(bash scripts/slurm/state.sh "$2")"
    echo "${JOB_NAME}: ${state}" | tee "$2/state"
    case "${state}" in
        "time limit"*)
            if [ "${REQUEUE:-1}" = 1 ] && [ -n "${SLURM_JOB_ID:-}" ] &&
                [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_REQUEUES:-100}" ]; then
                scontrol requeue "${SLURM_JOB_ID}"
            fi
            ;;
        cancelled* | preempted*) exit 143 ;;
    esac
    exit "$1"
}
