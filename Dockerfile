# Three images from one file:
#   docker build --target servers .   MLflow and Prefect servers, bootstrap: no torch
#   docker build --target cpu .       a worker on processors
#   docker build --target cuda .      a worker on NVIDIA GPUs (torch's CUDA build; the host has the driver and the container toolkit)
# Every package is the one that requirements.lock names. The project's code comes last, so that a change of it rebuilds one small layer.
FROM python:3.11.13-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    DO_NOT_TRACK=true MLFLOW_DISABLE_TELEMETRY=true MLFLOW_MODEL_CATALOG_URI="" DVC_NO_ANALYTICS=1 PREFECT_SERVER_ANALYTICS_ENABLED=false
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin danceopd \
    && install --directory --owner=danceopd /app /state \
    && git config --system --add safe.directory '*'
WORKDIR /app
ENTRYPOINT ["tini", "-g", "--"]

FROM base AS servers
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint requirements.lock "mlflow[auth]" prefect fastapi psycopg2-binary asyncpg boto3 requests ruamel.yaml annotated-types
COPY --chown=danceopd . .
USER danceopd

FROM base AS cpu
COPY requirements.lock ./
# The processors' build of torch has its own index; everything else comes from the usual one.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    grep '^torch==' requirements.lock | xargs pip install --no-deps --index-url "$TORCH_INDEX" \
    && pip install --requirement requirements.lock
COPY --chown=danceopd . .
USER danceopd

FROM base AS cuda
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip pip install --requirement requirements.lock
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --chown=danceopd . .
USER danceopd
