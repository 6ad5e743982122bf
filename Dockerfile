# docker build -t parablock .                              the torch of PyPI, which brings its CUDA libraries
# docker build -t parablock --build-arg TORCH_INDEX=URL .    another build of torch: PyTorch's index for your platform
ARG BASE=python:3.12-slim
# hadolint ignore=DL3006
FROM ${BASE}
ARG TORCH_INDEX=
# the extras that are installed: serve, or ray for replicas
ARG EXTRAS=serve

ENV OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1 HF_HOME=/home/parablock/.cache/huggingface
WORKDIR /opt/parablock

# torch first: it changes least
COPY constraints.txt ./
# it is pinned, behind the option
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch==2.13.0

COPY pyproject.toml README.md LICENSE ./
COPY parablock ./parablock
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" \
    && useradd --create-home --uid 10001 parablock \
    && install -d -o parablock -g parablock "${HF_HOME}"

USER 10001
WORKDIR /home/parablock
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
ENTRYPOINT ["parablock", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["bundled"]
