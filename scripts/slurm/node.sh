#!/usr/bin/env bash
# One node's share of a job; started by lib.sh's on_nodes.
#   node.sh train ENTRY ARGS...    the ranks of this node, by torch.distributed.run
#   node.sh compare ARGS...        `helix compare`, which starts its ranks itself
#   node.sh serve ARGS...          `helix serve` on this node's ranks
# USR1 (Slurm's warning before the time limit) and TERM (cancel, preemption) become TERM in the ranks, where
# Megatron's --exit-signal-handler saves a checkpoint and leaves.
set -euo pipefail
NODE_RANK="${SLURM_NODEID:-0}"
what="$1"
shift
ranks_logs="${TMPDIR:-/tmp}/helix-${SLURM_JOB_ID:-$$}-${NODE_RANK}" # torchrun's, copied by --tee
case "${what}" in
    train)
        command=("${PYTHON}" -m torch.distributed.run --nnodes "${NNODES}" --node-rank "${NODE_RANK}"
            --nproc-per-node "${RANKS_PER_NODE}" --master-addr "${MASTER_ADDR}" --master-port "${MASTER_PORT}"
            --log-dir "${ranks_logs}" --tee 3 "$@")
        # Fresh interpreters: helix_megatron.launch knows a single node, and saves nothing on TERM.
        [ "${HELIX_HOST_MODE}" = 0 ] || command+=(--helix-host-mode)
        # shellcheck disable=SC2016  # torchrun fills it in
        export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank${rank}]: '
        ;;
    compare)
        command=("${PYTHON}" -m helix_megatron.cli compare "$@")
        [ "${NNODES}" = 1 ] ||
            command+=(--node-rank "${NODE_RANK}" --rdzv-endpoint "${MASTER_ADDR}:${MASTER_PORT}")
        ;;
    serve)
        command=("${PYTHON}")
        [ "${HELIX_HOST_MODE}" != 0 ] || command+=(-m torch.distributed.run --standalone
            --nproc-per-node "${RANKS_PER_NODE}" --log-dir "${ranks_logs}" --tee 3)
        command+=(-m helix_megatron.cli serve --tensor-model-parallel-size "${RANKS_PER_NODE}" "$@")
        ;;
    *)
        echo "node.sh: there is no '${what}'; there are train, compare and serve" >&2
        exit 2
        ;;
esac

# shellcheck disable=SC2317  # called by the traps
stop() {
    echo "helix: node ${NODE_RANK} received $1; its ranks are told to save and stop"
    stopped="$1"
    # Slurm's TERM has reached the ranks and `helix` as well; a second one would end them at once.
    [ "${what} $1 ${SLURM_JOB_ID:+slurm}" != "serve TERM slurm" ] || return 0
    if [ "${what}" = train ] || { [ "${what}" = serve ] && [ "${HELIX_HOST_MODE}" = 0 ]; }; then
        pkill -TERM -P "${child}" || true # torchrun itself would kill them after 30 s
    else
        kill -TERM "${child}" 2>/dev/null || true
    fi
}
child="" stopped=""
trap 'stop USR1' USR1
trap 'stop TERM' TERM
# Some of Slurm's process trackers signal every process of the job: USR1 must not end torchrun or a rank.
(
    trap '' USR1
    exec "${command[@]}"
) &
child=$!
while :; do # a trapped signal ends `wait`, not the child
    status=0
    wait "${child}" || status=$?
    kill -0 "${child}" 2>/dev/null || break
done
rm -rf "${ranks_logs}"
[ -z "${stopped}" ] || echo "helix: node ${NODE_RANK} has stopped, exit code ${status}"
exit "${status}"
