"""The BentoML service: what `bentoml serve service.app:Service` and `bentoml build` start from.

BentoML supervises the process, keeps the sockets, builds the image, and its Python client calls `Service.predict`. Every request
is answered by the FastAPI app: BentoML's own routes come first in its router, and they would parse bodies themselves (fetching a
URL that stands where a file should be), answer errors in three other shapes and cut off an upload after a minute. So the only
request that BentoML's app gets to see is the one for its client's schema.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import bentoml
from _bentoml_sdk import Service as BentoService
from fastapi import FastAPI
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from finetune.bundle.registry import Registry
from finetune.jobs.history import updates
from finetune.jobs.leash import signal_when_parent_dies
from finetune.jobs.store import Event
from service.auth import Authentication
from service.envelope import Envelope
from service.feed import Feed
from service.files_routes import files_router
from service.job_documents import event_document
from service.job_schema import JOB_SCHEMAS
from service.jobs_routes import jobs_router
from service.limits import MAX_JSON_BYTES, MULTIPART_OVERHEAD_BYTES, PROBES, BodyPace, HostAllowList, Slots
from service.metrics import Metrics
from service.models import LiveModels
from service.models_routes import models_router
from service.parts import Database, Parts
from service.predictions import PredictionAnswer, PredictOptions, Upload, predict
from service.problems import add_handlers, component_schemas
from service.routes import STATIC, predict_router, server_router
from service.settings import Settings
from service.uploads import Uploads
from service.worker import WorkerProcess

BENTOML_PATHS = ("/schema.json",)
WAITING_PER_THREAD = 16
KEY_DESCRIPTION = "An API key (`finetune keys create`). A server without any key is open, to its own machine alone."


class Api(FastAPI):
    """A FastAPI app whose OpenAPI document shows errors, the job request and whether a key is needed as they are."""

    def __init__(self, needs_key: Callable[[], bool], **options: Any) -> None:
        super().__init__(**options)
        self._needs_key = needs_key

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"]["schemas"] |= {**component_schemas(), **JOB_SCHEMAS}
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": KEY_DESCRIPTION}}
        document["security"] = [{"key": []}] if self._needs_key() else [{"key": []}, {}]
        for path in PROBES:
            document["paths"][path]["get"]["security"] = []
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
    database = Database(settings.home)
    parts = Parts(
        home=settings.home,
        models=models,
        metrics=metrics,
        slots=Slots(settings.threads, waiting=WAITING_PER_THREAD * settings.threads),
        image_limits=settings.image_limits,
        database=database,
        feed=Feed(lambda known: updates(database.engine, known), lambda event: _shown(parts, event)),
        uploads=Uploads(settings.files_folder),
        data_roots=settings.data_roots,
        max_files_bytes=settings.max_files_bytes,
        max_unfinished_jobs=settings.max_unfinished_jobs,
        default_is_chosen=settings.model is not None,
    )
    worker = WorkerProcess(settings.home) if settings.worker else None

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        logging.getLogger("service").setLevel(logging.INFO)
        parts.uploads.sweep(database.files.ids)
        models.start()
        if threading.current_thread() is threading.main_thread():  # a test's server is in a thread, and nobody sends it signals
            signal_when_parent_dies(signal.SIGTERM)  # else a killed supervisor would leave this process on its port
            _end_streams_on_sigterm(parts.feed)
        if worker is not None:
            worker.start()
        yield
        parts.feed.close()
        if worker is not None:
            await worker.stop()
        models.stop()

    api = Api(
        lambda: bool(database.keys.list()),
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
    api.state.parts = parts
    add_handlers(api)
    api.include_router(predict_router(settings.image_limits.max_bytes + MULTIPART_OVERHEAD_BYTES))
    api.include_router(models_router)
    api.include_router(files_router(settings.max_upload_bytes + MULTIPART_OVERHEAD_BYTES))
    api.include_router(jobs_router)
    api.include_router(server_router)
    api.mount("/static", StaticFiles(directory=STATIC), name="static")
    return api


def _shown(parts: Parts, event: Event) -> dict[str, Any]:
    return event_document(event, parts.within).model_dump()


def _end_streams_on_sigterm(feed: Feed) -> None:
    """The server waits for open answers before it tells the app to stop, and a stream of events has no end of its own."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        stop = signal.getsignal(number)  # the server's own

        def close_first(received: int, frame: FrameType | None, stop: Any = stop) -> None:
            loop.call_soon_threadsafe(feed.close)
            if callable(stop):
                stop(received, frame)

        signal.signal(number, close_first)


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
            guarded = Authentication(BodyPace(door), lambda: parts.database.keys)
            return Envelope(HostAllowList(guarded, settings.allowed_hosts), parts.metrics)

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
