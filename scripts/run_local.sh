#!/usr/bin/env bash
# A Slurm job's script on this machine alone, without Slurm:
#   scripts/run_local.sh train|compare|scaling|serve ARGS...   with the variables of docs/cluster.md
#   HELIX_HOST_MODE=1 RANKS_PER_NODE=2 scripts/run_local.sh train --helix-config run.yaml
# USR1 or Ctrl-C: the ranks save and stop. The next start with the same JOB_NAME goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
job="${1:-}"
if [ ! -f "scripts/slurm/${job}.sbatch" ]; then
    echo "run_local: there is no job '${job}'; there are train, compare, scaling and serve" >&2
    exit 2
fi
shift
if [ -z "${PYTHON:-}" ]; then
    # shellcheck source=scripts/env.sh
    source scripts/env.sh
fi
unset "${!SLURM_@}" # inside an allocation too: this machine alone
export JOB_NAME="${JOB_NAME:-helix-${job}}" HELIX_ROOT="${PWD}"
exec bash "scripts/slurm/${job}.sbatch" "$@"
