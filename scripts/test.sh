#!/usr/bin/env bash
# Everything that is checked: linters, types, the test suite, the oldest Megatron, the wheel, the documentation.
# With arguments only the linters and pytest with them.
#   HELIX_TEST_WORKERS=2   how many test files run at once
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/env.sh
source scripts/env.sh
if [ "${HELIX_OLDEST}" = 1 ]; then # env.sh has said what that leaves out
    HELIX_VENV_OLDEST="${HELIX_VENV}" exec scripts/test_oldest.sh "$@"
fi
ruff check .
lint-imports --no-cache --no-logo
mypy
if command -v shellcheck >/dev/null; then
    shellcheck -x scripts/*.sh scripts/slurm/* .ci/run
else
    echo "helix: shellcheck is not installed; the shell scripts are not linted" >&2
fi
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
scripts/check_wheel.sh
scripts/docs.sh
scripts/test_oldest.sh
exec python -m pytest -n "${HELIX_TEST_WORKERS:-2}"
