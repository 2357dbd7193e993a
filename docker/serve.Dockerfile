# syntax=docker/dockerfile:1
# Serves predictions: ONNX Runtime and BentoML, no torch. Build from the repository's root:
#   docker build -f docker/serve.Dockerfile -t finetune-serve .
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY finetune finetune
COPY service service
RUN python -m venv /opt/finetune \
 && /opt/finetune/bin/pip install --no-cache-dir --constraint constraints.txt '.[postgres]'

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home finetune && mkdir /data && chown finetune /data
COPY --from=build /opt/finetune /opt/finetune
ENV PATH=/opt/finetune/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FINETUNE_HOME=/data \
    BENTOML_DO_NOT_TRACK=True
USER finetune
VOLUME /data
EXPOSE 3000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:3000/readyz', timeout=2)"]
ENTRYPOINT ["finetune"]
CMD ["serve", "--host", "0.0.0.0", "--port", "3000"]
