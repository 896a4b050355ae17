#!/usr/bin/env bash
# Build the documentation into build/docs. A warning is an error; a link inside it that leads nowhere is one.
#   scripts/docs.sh            without a network; in every test run
#   scripts/docs.sh --links    also ask every link to elsewhere whether it is there (needs a network)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
sphinx() { "${PYTHON:-python}" -m sphinx --quiet --fail-on-warning --keep-going "$@"; }
sphinx -b html docs build/docs
echo "docs: build/docs/index.html"
case "${1:-}" in
    "") ;;
    --links) sphinx -b linkcheck docs build/links && echo "docs: all links lead somewhere" ;;
    *) echo "docs: there is no '$1'; there is --links" >&2 && exit 2 ;;
esac
