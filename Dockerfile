# The same pins for CPU and GPU: PyPI's torch brings CUDA. A smaller image for CPU only:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu -t skipllm .
# Not slim: it has the C compiler that the CPU kernels need.
FROM python:3.11 AS build
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
RUN python -m venv /opt/skipllm
ENV PATH=/opt/skipllm/bin:$PATH
# Dependencies first, and our code apart: its change does not install torch again, and an update of
# the image pulls some 10 MB.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt
COPY README.md LICENSE ./
COPY configs configs
COPY server server
COPY skipllm_core skipllm_core
RUN pip install --no-cache-dir --no-deps --prefix /package .

FROM python:3.11-slim
# Triton builds its driver and launches with it, on the machine that has the GPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# Group 0 and group-writable folders: platforms that pick their own uid (OpenShift) work too.
RUN useradd --uid 1000 --gid 0 --create-home skipllm \
    && install -d -o 1000 -g 0 -m 0775 /models
COPY --from=build /opt/skipllm /opt/skipllm
COPY --from=build /package /opt/skipllm
ENV PATH=/opt/skipllm/bin:$PATH \
    HF_HOME=/models \
    TRITON_CACHE_DIR=/models/.triton \
    PYTHONUNBUFFERED=1 \
    SKIPLLM_HOST=0.0.0.0
USER 1000:0
WORKDIR /home/skipllm
VOLUME /models
EXPOSE 8000
STOPSIGNAL SIGTERM
# A port set by SKIPLLM_PORT is known here; one set by --port or a file is not.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ.get('SKIPLLM_PORT') or 8000}/health\", timeout=4)"]
ENTRYPOINT ["skipllm", "serve"]
