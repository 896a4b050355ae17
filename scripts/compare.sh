#!/usr/bin/env bash
# The first look, from nothing:  ./scripts/compare.sh [flags of `helix compare`]
# Small GPTs as Megatron and as Helix on this machine's cores: one screen, and the whole of it in
# runs/first_look/report.html, report.md and results.json; what was there before is replaced
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/env.sh
source scripts/env.sh
mode=--overwrite
for flag in "$@"; do
    case "${flag}" in --resume | --report | --overwrite) mode="" ;; esac
done
exec helix compare configs/first_look.yaml ${mode:+"${mode}"} "$@"
