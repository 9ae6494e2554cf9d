# Serves bundles/default, or any bundle that is mounted, on port 8000:
#   docker build -t allattn .
#   docker run --rm --read-only --tmpfs /tmp --stop-timeout 35 -p 8000:8000 allattn
#   docker run ... --gpus all allattn                                    (the same image; torch's wheels bring CUDA along)
#   docker run ... -v DIR:/bundle:ro -e ALLATTN_BUNDLE=/bundle allattn
#   docker run --rm --entrypoint allattn allattn generate "It was a dark"        (and the other commands of allattn)
# `--stop-timeout` leaves live requests the time that `shutdown_timeout_s` grants them; docker's own is 10 s.
# More extras of pyproject.toml are named by `--build-arg EXTRAS="server onnx"`.
# torch comes from the package index that the builder's pip is set up with; one of CPU wheels gives a small image.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /app
RUN python -m venv --without-pip /opt/venv
# Dependencies come first and from pyproject.toml alone, so that a change of the code does not load torch again.
COPY pyproject.toml .
ARG EXTRAS=server
RUN python -c "import sys, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], sep='\n'); \
        [print(*project['optional-dependencies'][extra], sep='\n') for extra in sys.argv[1:]]" ${EXTRAS} \
        > /tmp/requirements.txt \
    && pip --python /opt/venv/bin/python install --requirement /tmp/requirements.txt
COPY . .
# The native step is compiled with a compiler from PyPI, which does not stay in the image.
RUN pip install --target /tmp/zig ziglang==0.17.1 \
    && PYTHONPATH=/app:/tmp/zig /opt/venv/bin/python -m model.frozen.native.build \
    && rm -rf /tmp/zig
# The code runs from here, by PYTHONPATH. Of the package only its name, its version, which /info tells, and the command
# allattn are installed. Nobody can write here when the image runs, so the bytecode is made now.
RUN mkdir /tmp/allattn && cp pyproject.toml README.md LICENSE /tmp/allattn \
    && pip --python /opt/venv/bin/python install --no-deps /tmp/allattn \
    && python -m compileall -q --invalidation-mode unchecked-hash .

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="allattn" \
      org.opencontainers.image.description="HTTP server for all-attention language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
# HOME is the only place that can be written to, if there is any.
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp ALLATTN_HOST=0.0.0.0
WORKDIR /app
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-m", "deploy.probe"]
ENTRYPOINT ["python", "-m", "server"]
