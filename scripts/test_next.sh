#!/usr/bin/env bash
# Layers, specs, checkpoints, the dynamic engine and trainings on a Megatron core that is not the project's: its
# development tree, or a release to come. Beside the packages of the project's own environment, of which nothing
# changes; by hand, not in every test run.
#   scripts/test_next.sh ~/Megatron-LM      a checkout, built into build/megatron-next as pip builds it
#   scripts/test_next.sh 0.20.0             a release
# What follows goes to pytest.
set -euo pipefail
if [ $# = 0 ]; then
    echo "usage: scripts/test_next.sh CHECKOUT_OR_VERSION [PYTEST_ARGUMENT...]" >&2
    exit 2
fi
what="megatron-core==$1"
[ ! -d "$1" ] || what="$(cd "$1" && pwd)"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
files=(partition/test_layout.py checkpoint/test_{compatibility,checkpoint}.py inference/test_kv_cache.py
    host/test_host.py generate/test_generate.py
    megatron_glue/test_{versions,layer,attention_exact,integrate,plugin,pretrain,refusals,resharding,training}.py)
# 0.20 without Transformer Engine builds no multi-token prediction, sliced heads or not.
skipped=(--deselect "tests/megatron_glue/test_training.py::test_multi_token_prediction_differs_under_context_\
parallelism_by_megatrons_count_alone")
# shellcheck source=scripts/env.sh
source scripts/env.sh
target="${PWD}/build/megatron-next"
rm -rf "${target}"
python -m pip install --quiet --disable-pip-version-check --no-deps --target "${target}" "${what}"
export PYTHONPATH="${target}:${PWD}"
exec python -m pytest -n "${HELIX_TEST_WORKERS:-2}" "${files[@]/#/tests/}" "${skipped[@]}" "$@"
