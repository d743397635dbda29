# sslx with everything that it needs, for a CPU or for GPUs whose driver runs CUDA 13:
#   docker build --tag sslx .
#   docker run --rm --gpus all --volume "$PWD:/work" sslx pretrain --source.root photos
# The wheels of torch and DALI bring their CUDA libraries along, so the base image needs none.
FROM python:3.12-slim

# torch.compile needs a C++ compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml README.md LICENSE /src/
COPY sslx /src/sslx
COPY kernels /src/kernels
RUN pip install --no-cache-dir /src

# Of the driver, only computing and nvidia-smi; runs/ is written to the folder that is mounted here.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
ENTRYPOINT ["sslx"]
CMD ["--help"]
