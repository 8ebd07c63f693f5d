# hd-serve on a CPU, with the demo unless another bundle is mounted:
#
#   docker build -f docker/cpu.Dockerfile -t handiffuser:cpu .
#   docker run --rm -p 8000:8000 --read-only --tmpfs /tmp handiffuser:cpu
#   docker run --rm -p 8000:8000 -v ./engines:/engines:ro handiffuser:cpu /engines --host 0.0.0.0
FROM python:3.12-slim AS build
WORKDIR /source
COPY . .
RUN rm -rf build && python -m venv /venv && /venv/bin/pip install --no-cache-dir ".[cpu,serve]"

FROM python:3.12-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin serve
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
# The libraries send no reports to their makers; handiffuser.telemetry lists these settings.
ENV ORT_DISABLE_TELEMETRY=1 RAY_USAGE_STATS_ENABLED=0 HF_HUB_DISABLE_TELEMETRY=1
USER 10001
EXPOSE 8000
# Checks that the server is alive, so that Docker does not stop it while it loads. /readyz says when it is ready.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["hd-serve"]
CMD ["demo", "--host", "0.0.0.0"]
