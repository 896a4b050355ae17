#!/usr/bin/env bash
# Helix inside a Megatron-LM checkout, for those who do not start its scripts with -m helix_megatron.run:
#   scripts/patch_megatron.sh apply  MEGATRON_DIR    twice is once
#   scripts/patch_megatron.sh check  MEGATRON_DIR    exit code 0: applied; 1: not applied, but it fits
#   scripts/patch_megatron.sh revert MEGATRON_DIR
# Exit code 2: the tree is not one that a patch here fits, or the command is wrong.
set -euo pipefail
patches="$(cd "$(dirname "${BASH_SOURCE[0]}")/../patches" && pwd)"

fail() {
    echo "patch_megatron: $*" >&2
    exit 2
}

[ $# -eq 2 ] || fail "got $# arguments; usage: patch_megatron.sh apply|check|revert MEGATRON_DIR"
action="$1"
[[ "${action}" =~ ^(apply|check|revert)$ ]] || fail "no action '${action}'; there are apply, check, revert"
tree="$(cd "$2" 2>/dev/null && pwd -P)" || fail "no folder $2; give the folder of a Megatron-LM checkout"
info="${tree}/megatron/core/package_info.py"
[ -f "${info}" ] || fail "${tree} is not a Megatron-LM checkout: it has no megatron/core/package_info.py"

version="$(sed -n -E 's/^(MAJOR|MINOR|PATCH) = ([0-9]+).*/\2/p' "${info}" | paste -sd.)"
tags="$(basename -a "${patches}"/megatron-lm-*.patch | sed -E 's/megatron-lm-(.*)\.patch/\1/' | sort -V)"
# Nearest: the newest tag that is not newer than the tree, else the oldest.
ours="core_v${version}.x" # sorts right after its own tag
nearest="$(printf '%s\n' "${tags}" "${ours}" | sort -V | sed -n "/^${ours}\$/q;p" | tail -n 1)"
nearest="${nearest:-$(head -n 1 <<<"${tags}")}"
way_out="the nearest tag with a patch is ${nearest}: git -C ${tree} checkout ${nearest}"
patch="${patches}/megatron-lm-${nearest}.patch"

try() { # a checkout inside another repository must not be taken for a folder of that repository
    GIT_CEILING_DIRECTORIES="$(dirname "${tree}")" git -C "${tree}" apply "$@" "${patch}" 2>/dev/null
}

if [[ "${nearest}" != "core_v${version%.*}."* ]]; then
    fail "${tree} is Megatron-LM ${version}, for which there is no patch; ${way_out}"
elif try --reverse --check; then
    state=applied
elif try --check; then
    state=absent
else
    fail "${tree} says it is ${version}, but its megatron/training/arguments.py is not the release's where" \
        "it would be changed; ${way_out}"
fi

where="${tree} (Megatron-LM ${version})"
case "${action} ${state}" in
    "apply absent")
        try || fail "git apply could not write to ${tree}"
        echo "applied ${patch##*/} to ${where}"
        ;;
    "apply applied") echo "already applied to ${where}" ;;
    "check absent") echo "not applied to ${where}; it fits" && exit 1 ;;
    "check applied") echo "applied to ${where}" ;;
    "revert absent") echo "not applied to ${where}: nothing to revert" ;;
    "revert applied")
        try --reverse || fail "git apply could not write to ${tree}"
        echo "reverted in ${where}"
        ;;
esac
grep -qE " ${version//./\\.}([^0-9]|\$)" < <(sed '/^diff /q' "${patch}") ||
    echo "patch_megatron: it fits, but ${version} is not one of those that it was tried on: ${patch##*/} names them" >&2
