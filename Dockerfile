# quill serve in a container: docker compose up, or see `quill help container`.
FROM python:3.13-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/quill
ENV PATH=/opt/quill/bin:$PATH
# The CPU's build of torch, before anything asks for the one with gigabytes of CUDA. The package has lower
# bounds alone, and an image has what is newest when it is built.
# hadolint ignore=DL3013
RUN pip install torch --index-url https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY . .
# hadolint ignore=DL3013
RUN pip install '.[serve]'

FROM python:3.13-slim-trixie
COPY --from=build /opt/quill /opt/quill
# A number, so that Kubernetes can tell that it is not root. It owns its models and nothing else.
RUN install --directory --owner=10001 --group=10001 /weights
ENV PATH=/opt/quill/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    QUILL_REGISTRY=/weights
USER 10001:10001
WORKDIR /tmp
VOLUME ["/weights"]
EXPOSE 8000
# Whether the server lives; a model that is loading is no reason to restart it. No proxy stands between.
HEALTHCHECK --interval=30s --timeout=3s --start-period=60s --start-interval=2s --retries=3 \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=2); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["quill"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
