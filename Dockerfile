# Two images of one source:
#   docker build --target test .   CPU only; building it runs the checks and the tests
#   docker build --target cuda .   CUDA with flash-attention and the linear-attention kernels
FROM python:3.11-slim AS test
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /longhaul
# The CPU build of torch, from its own index, before anything else can ask for the CUDA one.
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
        'torch>=2.11,<2.14'
COPY . .
RUN .ci/run

FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04 AS cuda
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /longhaul
COPY pyproject.toml LICENSE README.md ./
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir --editable . ninja
# The kernels' build scripts import torch, so they cannot be built in isolation from it.
RUN /opt/venv/bin/pip install --no-cache-dir --no-build-isolation --editable '.[gpu]'
COPY . .
ENV PATH=/opt/venv/bin:$PATH
# torchrun that lets its ranks save, however long it takes, before the container is stopped.
ENTRYPOINT ["python", "/longhaul/scripts/launch.py"]
CMD ["--standalone", "--nproc-per-node", "gpu", "scripts/train.py", "model=kimi_linear"]
