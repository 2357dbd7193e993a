"""The BentoML service: what `bentoml serve service.app:Service` and `bentoml build` start from.

BentoML supervises the process, keeps the sockets, builds the image, and its Python client calls `Service.predict`. Every request
is answered by the FastAPI app: BentoML's own routes come first in its router, and they would parse bodies themselves (fetching a
URL that stands where a file should be), answer errors in three other shapes and cut off an upload after a minute. So the only
request that BentoML's app gets to see is the one for its client's schema.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bentoml
from _bentoml_sdk import Service as BentoService
from fastapi import FastAPI
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from finetune.bundle.registry import Registry
from service.envelope import Envelope
from service.limits import MAX_JSON_BYTES, MULTIPART_OVERHEAD_BYTES, BodyPace, HostAllowList, Slots
from service.metrics import Metrics
from service.models import LiveModels
from service.predictions import PredictionAnswer, PredictOptions, Upload, predict
from service.problems import add_handlers, component_schemas
from service.routes import STATIC, Parts, models_router, predict_router, server_router
from service.settings import Settings

BENTOML_PATHS = ("/schema.json",)
WAITING_PER_THREAD = 16


class Api(FastAPI):
    """A FastAPI app whose OpenAPI document shows errors as they are."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"]["schemas"] |= component_schemas()
        return document


def create_api(settings: Settings) -> FastAPI:
    """The FastAPI app with its live models, which start and stop with it."""
    models = LiveModels(
        Registry(settings.models_folder),
        default=settings.model,
        capacity=settings.max_loaded_models,
        watch_seconds=settings.watch_seconds,
    )
    metrics = Metrics()
    metrics.watch_models(models)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        logging.getLogger("service").setLevel(logging.INFO)
        models.start()
        yield
        models.stop()

    api = Api(
        title="finetune",
        version=version("finetune"),
        description="Image classification with fine-tuned models. Every error is an RFC 9457 problem with a stable `code`.",
        openapi_url="/docs.json",
        docs_url=None,  # the interactive page would load its scripts from a foreign host
        redoc_url=None,
        lifespan=lifespan,
        max_body_size=MAX_JSON_BYTES,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    slots = Slots(settings.threads, waiting=WAITING_PER_THREAD * settings.threads)
    api.state.parts = Parts(models, metrics, slots, settings.image_limits)
    add_handlers(api)
    api.include_router(predict_router(settings.image_limits.max_bytes + MULTIPART_OVERHEAD_BYTES))
    api.include_router(models_router)
    api.include_router(server_router)
    api.mount("/static", StaticFiles(directory=STATIC), name="static")
    return api


class FrontDoor:
    """Sends every request to the FastAPI app, and only start-up, shut-down and the client's schema to BentoML."""

    def __init__(self, bento: ASGIApp, api: ASGIApp) -> None:
        self.bento = bento
        self.api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        to_bento = scope["type"] == "lifespan" or scope.get("path") in BENTOML_PATHS
        await (self.bento if to_bento else self.api)(scope, receive, send)


def build_service(settings: Settings) -> BentoService[Any]:
    """The BentoML service for `settings`: one process, `settings.threads` predictions at a time."""
    api = create_api(settings)
    parts: Parts = api.state.parts

    class FrontedService(BentoService[Any]):
        def to_asgi(self, is_main: bool = True) -> ASGIApp:
            door = FrontDoor(super().to_asgi(is_main=is_main), api)
            return Envelope(HostAllowList(BodyPace(door), settings.allowed_hosts), parts.metrics)

    @bentoml.service(
        name="finetune",
        service_class=FrontedService,
        workers=1,  # each worker would hold every model again; ONNX Runtime leaves the GIL, so threads use all cores
        threads=settings.threads,
        metrics={"enabled": False},
        monitoring={"enabled": False},
        logging={"access": {"enabled": False}},
    )
    @bentoml.asgi_app(api)
    class FinetuneService:
        @bentoml.api  # type: ignore[untyped-decorator]
        def predict(self, image: Path, top_k: int | None = None, explain: bool = False) -> PredictionAnswer:
            """Classify one image file: the most probable classes and, with `explain`, where the model looked."""
            options = PredictOptions(top_k=top_k, explain=explain)
            upload = Upload(image.read_bytes(), options, time.perf_counter())
            return predict(parts.models.default(), upload, parts.image_limits)

    return FinetuneService


Service = build_service(Settings.from_environment())
