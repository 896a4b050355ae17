#!/usr/bin/env bash
# The host comparison, from nothing:  ./scripts/compare.sh [flags of `helix compare`]
# Results: runs/compare_host/report.html, report.md and results.json; what was there before is replaced
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/env.sh
source scripts/env.sh
mode=--overwrite
for flag in "$@"; do
    case "${flag}" in --resume | --report | --overwrite) mode="" ;; esac
done
exec helix compare configs/compare_host.yaml ${mode:+"${mode}"} "$@"
