#!/usr/bin/env bash
# Layouts, exchanges, layers, checkpoints and host mode on the oldest Megatron core that Helix knows (0.16, Python
# 3.11 or 3.10), in an environment of its own. Without such a Python it says so and does nothing.
#   HELIX_MEGATRON="0.17 0.18" scripts/test_oldest.sh    the newest of these versions instead, beside the packages of
#                                                        the project's own environment; by hand, not in every test run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
files=(partition/test_layout.py kernels/test_merge.py inference/test_kv_cache.py host/test_host.py
    megatron_glue/test_{versions,layer,attention_exact,integrate}.py)
tests=(-n "${HELIX_TEST_WORKERS:-2}" "${files[@]/#/tests/}")
if [ -n "${HELIX_MEGATRON:-}" ]; then
    # shellcheck source=scripts/env.sh
    source scripts/env.sh
    for version in ${HELIX_MEGATRON}; do
        rm -rf "build/megatron-${version}"
        python -m pip install --quiet --no-deps --target "build/megatron-${version}" "megatron-core==${version}.*"
        PYTHONPATH="${PWD}/build/megatron-${version}:${PWD}" python -m pytest "${tests[@]}" "$@"
    done
    exit
fi
unset PYTHON
export HELIX_OLDEST=1 HELIX_VENV="${HELIX_VENV_OLDEST:-${PWD}/.venv-0.16}"
status=0
# shellcheck source=scripts/env.sh
source scripts/env.sh || status=$?
if [ "${status}" = 3 ]; then
    echo "helix: neither Python 3.11 nor 3.10: the oldest Megatron was not tested" >&2
    exit 0
fi
[ "${status}" = 0 ] || exit "${status}"
exec python -m pytest "${tests[@]}" "$@"
