# Helix for Megatron on the PyTorch container that Megatron core 0.19 is made for.
#   docker build --tag helix-megatron .
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" --volume "$PWD:/workspace" helix-megatron
# Build arguments:
#   FROM_IMAGE_NAME         the base; its torch, triton, Transformer Engine and apex stay as they are
#   MEGATRON_REPOSITORY     where the checkout in /opt/Megatron-LM comes from
#   MEGATRON_TAG            its tag: scripts and examples, patched to know the Helix flags
#   MEGATRON_CORE_VERSION   the megatron-core wheel that `-m helix_megatron.pretrain_gpt` uses
ARG FROM_IMAGE_NAME=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${FROM_IMAGE_NAME}

ARG MEGATRON_REPOSITORY=https://github.com/NVIDIA/Megatron-LM.git
ARG MEGATRON_TAG=core_v0.19.0
ARG MEGATRON_CORE_VERSION=0.19.2

LABEL org.opencontainers.image.title="Helix for Megatron" \
      org.opencontainers.image.description="Two-level tensor-parallel attention for Megatron-LM" \
      helix.megatron-lm.tag="${MEGATRON_TAG}" \
      helix.megatron-core.version="${MEGATRON_CORE_VERSION}"

# The data set helper is built here: who runs the image need not be able to write to the checkout.
RUN git clone --quiet --depth 1 --branch "${MEGATRON_TAG}" "${MEGATRON_REPOSITORY}" /opt/Megatron-LM \
    && make -C /opt/Megatron-LM/megatron/core/datasets

COPY . /opt/helix
RUN MEGATRON_CORE_VERSION="${MEGATRON_CORE_VERSION}" /opt/helix/scripts/install_into_base.sh /opt/helix \
    && /opt/helix/scripts/patch_megatron.sh apply /opt/Megatron-LM \
    && chmod -R a+rX /opt/helix /opt/Megatron-LM

# For any user, also one without a home.
ENV HOME=/tmp
WORKDIR /workspace
USER 1000:1000
HEALTHCHECK --interval=10m --timeout=2m --start-period=1m CMD ["helix", "doctor"]
CMD ["helix", "doctor"]
