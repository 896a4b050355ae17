#!/usr/bin/env bash
# The whole test suite: linters, type checks, then pytest. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/env.sh
source scripts/env.sh
ruff check .
mypy
if command -v shellcheck >/dev/null; then
    shellcheck -x scripts/*.sh scripts/slurm/* .ci/run
else
    echo "helix: shellcheck is not installed; the shell scripts are not linted" >&2
fi
exec python -m pytest "$@"
