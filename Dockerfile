# distgan in a container. PyPI's torch brings CUDA with it, so one image trains on GPUs (the host needs NVIDIA's driver and
# container toolkit) and on CPUs. A smaller one for CPUs alone takes torch from the package index that PyTorch's
# installation page names for CPUs.
#
#   docker build --tag distgan .
#   docker build --tag distgan:cpu --build-arg TORCH_INDEX=ADDRESS_OF_THE_INDEX .
#   docker run --rm --gpus all --shm-size=1g --user "$(id -u):$(id -g)" --volume "$PWD:/work" distgan \
#       distgan train --config quickstart
#   apptainer build distgan.sif docker-daemon:distgan:latest     # then, in slurm/train.sbatch, the line `within=…`
#
# Not built yet where we test, which has no images to start from.
FROM python:3.11-slim AS wheel
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /source

FROM python:3.11-slim
ARG TORCH_INDEX=""
# hadolint ignore=DL3013  # the bounds are those of pyproject.toml
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.14" "torchvision>=0.29"
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir /wheel/*.whl
# Any user may run it: what is kept goes to /work, and caches to /tmp.
ENV HOME=/tmp USER=distgan NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
CMD ["distgan", "--help"]
