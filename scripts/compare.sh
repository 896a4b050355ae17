#!/usr/bin/env bash
# The host comparison, from nothing:  ./scripts/compare.sh [flags of `helix compare`]
# Results: runs/compare_host/results.json and report.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/env.sh
source scripts/env.sh
exec helix compare configs/compare_host.yaml "$@"
