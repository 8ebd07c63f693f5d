# hd-serve on NVIDIA GPUs: ONNX Runtime's CUDA provider, and TensorRT where the engines folder has plans for the GPU.
#
#   docker build -f docker/cuda.Dockerfile -t handiffuser:cuda .
#   docker run --rm --gpus all -p 8000:8000 -v ./engines:/engines:ro handiffuser:cuda /engines --host 0.0.0.0 --devices 0,1
#
# The driver comes from the host; CUDA and cuDNN come with the packages. TensorRT comes from NVIDIA's index: build with
# --build-arg EXTRAS=cuda,serve to leave it out.
FROM python:3.12-slim AS build
ARG EXTRAS=cuda,tensorrt,serve
WORKDIR /source
COPY . .
RUN rm -rf build && python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --extra-index-url https://pypi.nvidia.com ".[${EXTRAS}]"

FROM python:3.12-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin serve
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# The libraries send no reports to their makers; handiffuser.telemetry lists these settings.
ENV ORT_DISABLE_TELEMETRY=1 RAY_USAGE_STATS_ENABLED=0 HF_HUB_DISABLE_TELEMETRY=1
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["hd-serve"]
CMD ["/engines", "--host", "0.0.0.0"]
