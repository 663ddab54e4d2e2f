# CPU by default. With a GPU, for example:
#   docker build --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
ARG BASE=debian:12-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/streamquant
ENV PATH=/opt/streamquant/bin:$PATH

COPY constraints.txt pyproject.toml README.md LICENSE /src/
COPY streamquant /src/streamquant
RUN pip install --no-cache-dir -c /src/constraints.txt --extra-index-url ${TORCH_INDEX} /src

RUN useradd --create-home streamquant
USER streamquant
WORKDIR /data
ENTRYPOINT ["streamquant"]
