#!/usr/bin/env bash
# Build the documentation into build/docs. A warning is an error; a link that leads nowhere is one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
"${PYTHON:-python}" -m sphinx --quiet --fail-on-warning --keep-going -b html docs build/docs
echo "docs: build/docs/index.html"
