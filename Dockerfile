# One image for streams, trainer, retriever and the command line; docker-compose.yml says which of them a container is.
FROM python:3.11.16-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/streamtower/bin:$PATH
RUN python -m venv /opt/streamtower
WORKDIR /src

# The CPU build first: what pip finds by itself on Linux brings gigabytes of CUDA libraries along.
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "$TORCH_INDEX" "torch==$TORCH_VERSION"

# Dependencies are a layer of their own: a change of code does not fetch them again. Extras are left out: the dev stack
# has no place in a container, and Kafka and Qdrant are containers themselves.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > requirements.txt \
    && pip install --requirement requirements.txt --constraint constraints.txt

COPY . .
RUN pip install --no-deps .

FROM python:3.11.16-slim-bookworm
LABEL org.opencontainers.image.title="streamtower" org.opencontainers.image.licenses="Apache-2.0"
# A named volume takes over the owner of the folder that it is mounted on, so they are made here.
RUN groupadd --gid 10001 streamtower \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp streamtower \
    && install --directory --owner=10001 --group=10001 /var/lib/streamtower/models \
        /var/lib/streamtower/checkpoints /var/lib/streamtower/snapshots
COPY --from=build /opt/streamtower /opt/streamtower
COPY LICENSE /opt/streamtower/LICENSE
# The root is read-only: everything that is written and may be lost goes to /tmp, a tmpfs. The safe path keeps Python from
# importing what lies there.
ENV PATH=/opt/streamtower/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1 NUMBA_CACHE_DIR=/tmp/numba
USER 10001:10001
WORKDIR /tmp
CMD ["streamtower", "--help"]
