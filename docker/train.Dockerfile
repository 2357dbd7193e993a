# syntax=docker/dockerfile:1
# Trains: torch, timm, albumentations, MLflow. Build from the repository's root:
#   docker build -f docker/train.Dockerfile -t finetune-train .
#   docker run --rm -v "$PWD/photos:/photos:ro" -v finetune:/data finetune-train train --data /photos
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY finetune finetune
COPY service service
RUN pip install --no-cache-dir --constraint constraints.txt '.[train,postgres]' \
 && useradd --uid 10001 --create-home finetune && mkdir /data && chown finetune /data
ENV PYTHONUNBUFFERED=1 \
    FINETUNE_HOME=/data \
    MLFLOW_DISABLE_TELEMETRY=true
USER finetune
VOLUME /data
ENTRYPOINT ["finetune"]
CMD ["--help"]
