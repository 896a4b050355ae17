#!/usr/bin/env bash
# The whole test suite: linters, type checks, then pytest. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/env.sh
source scripts/env.sh
ruff check .
mypy
exec python -m pytest "$@"
