#!/usr/bin/env bash
# Install Megatron core and this project into an environment that brings its own torch (a container's), and
# change nothing that is there:  scripts/install_into_base.sh [SOURCE]
#   PYTHON=python                   whose environment
#   MEGATRON_CORE_VERSION=0.19.2    the wheel
set -euo pipefail
source_dir="${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
pip=("${PYTHON:-python}" -m pip --disable-pip-version-check)
work="$(mktemp -d)"
trap 'rm -rf "${work}"' EXIT

brought() { # everything but ours, as pip's constraints
    "${pip[@]}" list --format=freeze | grep -E '^[A-Za-z0-9._-]+==[0-9]' |
        grep -vE '^(megatron[-_]core|helix[-_]megatron)==' | LC_ALL=C sort
}

brought >"${work}/base.txt"
if ! grep -q '^torch==' "${work}/base.txt"; then
    echo "install_into_base: there is no torch here to keep; use pip install ${source_dir} instead" >&2
    exit 2
fi
"${pip[@]}" install --no-cache-dir --no-deps "megatron-core==${MEGATRON_CORE_VERSION:-0.19.2}" "${source_dir}"
# What the project needs besides: only what is missing, at versions that go with what is there.
"${PYTHON:-python}" -I - >"${work}/needs.txt" <<'NEEDS'
import importlib.metadata
import re

for name in ("helix-megatron", "megatron-core"):
    for need in importlib.metadata.requires(name) or []:
        if "extra ==" not in need and not re.match(r"(torch|triton|megatron-core)\b", need):
            print(need)
NEEDS
"${pip[@]}" install --no-cache-dir --constraint "${work}/base.txt" --requirement "${work}/needs.txt"
brought >"${work}/after.txt"
changed="$(LC_ALL=C comm -23 "${work}/base.txt" "${work}/after.txt")"
if [ -n "${changed}" ]; then
    echo "install_into_base: pip changed what the base brought: ${changed//$'\n'/, }" >&2
    exit 1
fi
