# The environment for GPUs, made by the same set-up as on any machine:
#
#   mkdir -p output
#   docker build --tag mini-llm --build-arg USER_ID="$(id -u)" .
#   docker run --rm --init --gpus all --ipc host --network host \
#       --volume "$PWD/output:/opt/mini_llm/output" mini-llm verify
#
# torch's CUDA build brings the CUDA libraries; the host has the driver and the NVIDIA Container
# Toolkit. The `kernels` extra compiles with nvcc: for it, give a BASE_IMAGE that has CUDA's compiler.
ARG BASE_IMAGE=debian:bookworm-slim
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# A compiler and Python's headers for Triton's and DeepSpeed's kernels, verbs for NCCL over
# InfiniBand, ssh and pdsh for --hostfile. Debian keeps only the newest version of a package, so
# that pinned ones would soon not be found.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ ibverbs-providers iproute2 libibverbs1 librdmacm1 openssh-client pdsh \
        python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The owner of what a run writes into a mounted folder.
ARG USER_ID=1000
RUN useradd --non-unique --uid "$USER_ID" --create-home --shell /bin/bash trainer \
    && install --directory --owner="$USER_ID" /opt/mini_llm /opt/mini_llm/output

USER ${USER_ID}
WORKDIR /opt/mini_llm
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Only what decides the packages, so that a change of code does not install them again. The index
# for all packages and the one for torch, if not pip's own:
ARG PIP_INDEX_URL
ARG TORCH_INDEX
COPY --chown=${USER_ID} launch.sh pyproject.toml LICENSE ./
COPY --chown=${USER_ID} mini_llm/__init__.py mini_llm/constraints.txt mini_llm/
RUN PIP_NO_CACHE_DIR=1 ./launch.sh setup ${TORCH_INDEX:+--torch_index "$TORCH_INDEX"} \
    && .venv/bin/python -c "import sys, torch; sys.exit(torch.version.cuda is None and \
        'pip offered a CPU build of torch: --build-arg TORCH_INDEX=URL of an index with CUDA builds')"

COPY --chown=${USER_ID} . .

ENTRYPOINT ["./launch.sh"]
CMD ["help"]
