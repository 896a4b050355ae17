#!/usr/bin/env bash
# Build the Dockerfile without an engine and try what comes out. By hand, as root: minutes, a network, and
#   apt-get install buildah debootstrap
# buildah builds it with chroot isolation on a stand-in for NVIDIA's image: a minimal Debian with git and a compiler,
# this machine's Python 3.12, and torch with what it needs, mounted from an environment instead of copied.
#   MEGATRON_REPOSITORY=…   where Megatron-LM is cloned from; a folder too (default: the Dockerfile's)
#   PYTHON=python           whose torch; its interpreter goes into the base
#   KEEP=1                  keep the images localhost/helix-base and localhost/helix-megatron
# In the image, as user 1000 and as another without a name: helix doctor, helix check --quick, two ranks train two steps, by the plugin's
# own entry and by the patched checkout's pretrain_gpt.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for program in buildah debootstrap; do
    command -v "${program}" >/dev/null && continue
    echo "build_image: no ${program}: apt-get install buildah debootstrap" >&2
    exit 3
done
python="${PYTHON:-python}"
work="$(mktemp -d)"
container="" keep="${KEEP:-0}"
cleanup() {
    [ -z "${container}" ] || buildah rm "${container}" >/dev/null
    [ "${keep}" = 1 ] || buildah rmi -f localhost/helix-megatron localhost/helix-base >/dev/null 2>&1 || true
    rm -rf "${work}"
}
trap cleanup EXIT
say() { echo "build_image: $* (${SECONDS} s)"; }

# ---- the base ----
packages="git,make,g++,ca-certificates,procps,libssl3,libffi8,libsqlite3-0,zlib1g,libbz2-1.0,liblzma5,libreadline8"
debootstrap --variant=minbase --include="${packages}" bookworm "${work}/root" >"${work}/log" ||
    { tail "${work}/log" && exit 1; }
prefix="$("${python}" -c 'import sys; print(sys.base_prefix)')"
cp -r "${prefix}/." "${work}/root/usr/local/"
rm -rf "${work}"/root/usr/local/lib/python3.*/site-packages/* "${work}"/root/var/cache/apt
ln -sf python3 "${work}/root/usr/local/bin/python"
chroot "${work}/root" ldconfig # a shared libpython is found
# Of the environment: pip, torch and what torch needs, as links to the folder that is mounted.
mkdir "${work}/root/opt/base-packages" "${work}/root/opt/base-site"
"${python}" - "${work}/root/opt/base-packages" /opt/base-site >"${work}/site" <<'LINKS'
import importlib.metadata as metadata
import os
import re
import sys
import sysconfig

links, mounted = sys.argv[1:]
site, todo, done = sysconfig.get_path("purelib"), ["torch", "numpy", "packaging", "pip"], set()
while todo:
    name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
    if name in done:
        continue
    done.add(name)
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        continue
    todo += [re.match(r"[\w.-]+", need)[0] for need in found.requires or [] if "extra ==" not in need]
    for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
        if not os.path.lexists(f"{links}/{top}"):
            os.symlink(f"{mounted}/{top}", f"{links}/{top}")
print(site)
LINKS
own="$(echo "${work}"/root/usr/local/lib/python3.*/site-packages)"
echo /opt/base-packages >"${own}/base.pth"
"${python}" -m pip install --quiet --target "${own}" pybind11
mounts=(--volume "$(cat "${work}/site"):/opt/base-site:ro")
cp /etc/ssl/certs/ca-certificates.crt "${work}/root/etc/ssl/certs/"
[ ! -e /etc/pip.conf ] || cp /etc/pip.conf "${work}/root/etc/"
settings=()
while IFS= read -r setting; do settings+=(--env "${setting}"); done < <(env | grep '^PIP_' || true)
container="$(buildah from scratch)"
buildah copy --quiet "${container}" "${work}/root" / >/dev/null
buildah config --env PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin "${settings[@]}" "${container}"
buildah commit --quiet --format docker --rm "${container}" localhost/helix-base >/dev/null
container=""
say "the stand-in base is there"

# ---- the image ----
arguments=(--build-arg FROM_IMAGE_NAME=localhost/helix-base)
if [ -d "${MEGATRON_REPOSITORY:-}" ]; then
    mounts+=(--volume "$(cd "${MEGATRON_REPOSITORY}" && pwd -P):/mnt/megatron:ro")
    arguments+=(--build-arg MEGATRON_REPOSITORY=file:///mnt/megatron)
elif [ -n "${MEGATRON_REPOSITORY:-}" ]; then
    arguments+=(--build-arg "MEGATRON_REPOSITORY=${MEGATRON_REPOSITORY}")
fi
buildah bud --isolation chroot --format docker --pull-never --layers=false "${mounts[@]}" "${arguments[@]}" \
    --tag localhost/helix-megatron .
say "the image is built"

# ---- what it does ----
container="$(buildah from --pull-never localhost/helix-megatron)"
inside() { buildah run --isolation chroot "${mounts[@]:0:2}" "$@"; }
inside "${container}" helix doctor
inside "${container}" helix check --quick --out /tmp/check
launch=(python -m helix_megatron.launch --nproc-per-node 2)
flags=(--helix-host-mode --helix-config /opt/helix/configs/tiny.yaml)
trained() { # the last rank's log
    inside "${container}" cat "$1/rank_1.log" >"${work}/rank_1.log"
    grep -E 'iteration +[0-9]+/.*lm loss: ' "${work}/rank_1.log" || true
    grep -qE 'iteration +2/ .*lm loss: ' "${work}/rank_1.log" || { cat "${work}/rank_1.log" >&2 && exit 1; }
}
inside --user 4321:4321 "${container}" "${launch[@]}" --log-dir /tmp/plugin \
    -m helix_megatron.pretrain_gpt "${flags[@]}" >"${work}/rank_0.log" || { tail "${work}/rank_0.log" && exit 1; }
trained /tmp/plugin
say "two ranks have trained, as a user without a name"
inside "${container}" "${launch[@]}" --log-dir /tmp/checkout -m helix_megatron.run \
    /opt/Megatron-LM/pretrain_gpt.py "${flags[@]}" >"${work}/rank_0.log" || { tail "${work}/rank_0.log" && exit 1; }
trained /tmp/checkout
say "two ranks have trained with the checkout's script, as user 1000"
inside "${container}" python -c "
import os; assert os.getuid() == 1000 and not os.access('/opt/helix', os.W_OK)"
buildah inspect --type image --format '{{.Docker.Config.Labels}} {{.Docker.Config.Healthcheck}}' \
    localhost/helix-megatron
echo
say "all done"
