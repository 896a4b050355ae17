#!/usr/bin/env bash
# Build the wheel, install it into an empty environment, use it from there: `helix doctor`, then two ranks train.
#   PYTHON=python   whose packages (torch, Megatron ...) the environment sees, so that they are not installed twice
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="${PWD}"
python="${PYTHON:-python}"
work="$(mktemp -d)"
trap 'rm -rf "${work}"' EXIT
unset PYTHONPATH

"${python}" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "${work}" .
"${python}" -m venv --without-pip "${work}/venv"
site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
own="$(site "${work}/venv/bin/python")"
# A path in a .pth file, whose own .pth files are not read: the editable install stays out of sight.
site "${python}" >"${own}/needs.pth"
"${python}" -m pip --python "${work}/venv/bin/python" install --quiet --disable-pip-version-check --no-deps \
    "${work}"/helix_megatron-*.whl

missing="$(comm -23 <(git ls-files 'helix_megatron/*' | sort) <(cd "${own}" && find helix_megatron -type f | sort))"
if [ -n "${missing}" ]; then
    echo "check_wheel: not in the wheel: ${missing//$'\n'/, }" >&2
    exit 1
fi
cd "${work}" # not in the repository, whose helix_megatron would be found first
export PATH="${work}/venv/bin:${PATH}"
python -c "
import helix_megatron, sys
sys.exit(0 if helix_megatron.__file__.startswith('${work}') else f'found {helix_megatron.__file__}')"
helix doctor >doctor.txt || { cat doctor.txt && exit 1; }
python -m helix_megatron.launch --nproc-per-node 2 --log-dir logs -m helix_megatron.pretrain_gpt \
    --helix-host-mode --helix-config "${root}/configs/tiny.yaml" >rank_0.log 2>&1 || { tail -n 30 rank_0.log && exit 1; }
grep -q 'Helix attention: ' rank_0.log
grep -q 'iteration  *2/ .*lm loss: ' logs/rank_1.log
echo "check_wheel: installed, fit, and two ranks have trained from it"
