# CPU by default. With a GPU, for example:
#   docker build --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 \
#     --build-arg PACKAGES='gcc python3-dev' .  # which Triton needs to start its kernels
ARG BASE=debian:12-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PACKAGES=

RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv ${PACKAGES} \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/streamquant
ENV PATH=/opt/streamquant/bin:$PATH

COPY constraints.txt pyproject.toml README.md LICENSE /src/
COPY streamquant /src/streamquant
RUN pip install --no-cache-dir -c /src/constraints.txt --extra-index-url ${TORCH_INDEX} '/src[fast]'

# A number, by which Kubernetes sees that it is not root. A new volume of Docker takes over the owner of /data; any other user works as well.
RUN useradd --uid 10001 --create-home streamquant \
    && install --directory --owner=streamquant --group=streamquant /data
USER 10001:10001
WORKDIR /data
# As process 1: it handles SIGTERM, and starts no processes to be waited for.
ENTRYPOINT ["streamquant"]
