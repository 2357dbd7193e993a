"""The ASGI application: the FastAPI app with its routes, wrapped in the middleware for all requests.

`python -m service` serves it with uvicorn in one process; `service.app` wraps it in a BentoML service for `bentoml serve` and
`bentoml build`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from finetune import __version__
from finetune.bundle.predictor import Predictor, check_provider
from finetune.bundle.registry import Registry
from finetune.executors.process_parent import signal_when_parent_dies
from finetune.jobs.history import updates
from finetune.jobs.job import Event
from finetune.jobs.sending import Reachable, Sender
from finetune.runtime.allocator import return_free_memory
from finetune.runtime.tracing import tracing_from_environment
from finetune.storage.workspace import Workspace
from service.admission import WorkQueue
from service.drift import DriftWatch
from service.event_streams import EventStreams
from service.exports import Exporter
from service.limits import HEALTH_CHECKS, MAX_JSON_BYTES, MULTIPART_OVERHEAD_BYTES
from service.metrics import Metrics
from service.middleware.auth import Authentication
from service.middleware.bodies import BodyLimits, BufferedBodies
from service.middleware.head import HeadAsGet
from service.middleware.hosts import HostAndOriginCheck
from service.middleware.overload import OverloadRefusal
from service.middleware.responses import ResponseMiddleware
from service.middleware.tracing import TracingMiddleware
from service.models import LoadedModels
from service.part_uploads import PartUploads
from service.pictures import PictureIndex
from service.plans import Planner
from service.problems import REQUEST_ID_HEADER, add_handlers, component_schemas
from service.promotions import Promotions
from service.routes.batch_predictions import batch_router
from service.routes.checks import checks_router, file_checks_router
from service.routes.comparisons import comparisons_router
from service.routes.deployment import deployment_router
from service.routes.files import files_router
from service.routes.inference_v2 import inference_v2_router
from service.routes.jobs import jobs_router
from service.routes.models import models_router
from service.routes.pictures import pictures_router
from service.routes.plans import plans_router
from service.routes.predict import predict_router
from service.routes.runs import runs_router
from service.routes.server import server_router
from service.routes.uploads import uploads_router
from service.routes.webhooks import webhooks_router
from service.samples import InputSampler
from service.schemas.batch_predictions import BATCH_SCHEMAS
from service.schemas.job_create import JOB_SCHEMAS
from service.schemas.jobs import event_document
from service.settings import ServerSettings
from service.shadows import Shadows
from service.spec_check import SpecChecker
from service.state import Database, ModelAccess, ServerState
from service.uploads import Uploads
from service.web import PageFiles
from service.worker import WorkerProcess

TRIM_SECONDS = 15.0
KEY_DESCRIPTION = "An API key (`finetune keys create`). A server without any key is open, to its own machine alone."


class Api(FastAPI):
    """A FastAPI app whose OpenAPI document also describes errors, the body of a job request, and whether a key is needed."""

    def __init__(self, needs_key: Callable[[], bool], **options: Any) -> None:
        super().__init__(**options)
        self._needs_key = needs_key

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"]["schemas"] |= {**component_schemas(), **JOB_SCHEMAS, **BATCH_SCHEMAS}
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": KEY_DESCRIPTION}}
        document["security"] = [{"key": []}] if self._needs_key() else [{"key": []}, {}]
        for path in HEALTH_CHECKS:
            document["paths"][path]["get"]["security"] = []
        return document


def create_app(settings: ServerSettings) -> ASGIApp:
    """Return the complete application. Models and worker start and stop with its lifespan."""
    return with_middleware(create_api(settings), settings)


def with_middleware(api: FastAPI, settings: ServerSettings) -> ASGIApp:
    """Return the app wrapped in the middleware, which is added from the innermost to the outermost."""
    state: ServerState = api.state.server
    buffered = BufferedBodies()
    app: ASGIApp = BodyLimits(HeadAsGet(api), buffered, _streams_to_disk)
    app = Authentication(app, lambda: state.database.keys)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
            allow_headers=("Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", REQUEST_ID_HEADER),
            expose_headers=("Location", "Retry-After", REQUEST_ID_HEADER),
        )
    app = HostAndOriginCheck(app, settings.allowed_hosts, settings.cors_origins)
    app = ResponseMiddleware(OverloadRefusal(app, state.queue, buffered), state.metrics)
    return app if state.tracing is None else TracingMiddleware(app, state.tracing)


def create_api(settings: ServerSettings, *, supervised: bool = False) -> FastAPI:
    """Return the FastAPI app with its routes and, in ``app.state.server``, their shared state.

    Args:
        supervised: end the server when its parent process ends, as BentoML needs it to free the port. Otherwise the server
            outlives its parent, which may be a shell that is closed.
    """
    check_provider(settings.provider)
    registry = Registry(settings.models_folder)
    models = LoadedModels(
        registry,
        default=settings.model,
        capacity=settings.max_loaded_models,
        max_bytes=settings.max_loaded_bytes,
        watch_seconds=settings.watch_seconds,
        load=partial(Predictor.load, provider=settings.provider),
    )
    metrics = Metrics()
    metrics.watch_models(models)
    database = Database(settings.home)
    workspace = replace(Workspace.from_environment(), root=settings.home.absolute())
    queue = WorkQueue(settings.threads)
    metrics.watch_queue(lambda: queue.taken + queue.batched)
    drift = DriftWatch(registry, lambda: database.webhooks, seconds=10 * settings.watch_seconds)
    metrics.watch_drift(drift.last_found)
    samples = InputSampler(registry, settings.sampling, metrics)
    state = ServerState(
        home=settings.home,
        models=models,
        access=ModelAccess(registry),
        metrics=metrics,
        queue=queue,
        shadows=Shadows(queue, metrics, settings.image_limits),
        drift=drift,
        samples=samples,
        image_limits=settings.image_limits,
        database=database,
        event_streams=EventStreams(lambda known: updates(database.engine, known), lambda event: _shown(state, event)),
        uploads=Uploads(settings.files_folder),
        part_uploads=PartUploads(settings.files_folder),
        checks=WorkQueue(2, max_wait_seconds=60.0),
        spec_checker=SpecChecker(workspace.cache / "notes"),
        pictures=PictureIndex(settings.image_limits),
        planner=Planner(workspace),
        exporter=Exporter(settings.home / "exports", settings.onnxruntime_web.absolute()),
        webhooks_reach=Reachable(settings.webhook_networks),
        tracing=tracing_from_environment(),
        data_roots=settings.data_roots,
        hub_models=settings.hub_models,
        max_files_bytes=settings.max_files_bytes,
        max_unfinished_jobs=settings.max_unfinished_jobs,
    )
    worker = WorkerProcess(settings.home) if settings.worker else None
    promotions = Promotions(registry, lambda: database.webhooks)
    webhooks = Sender(lambda: database.webhooks, state.webhooks_reach, promotions.collect)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        logging.getLogger("service").setLevel(logging.INFO)
        state.uploads.sweep(database.files.ids)
        state.part_uploads.sweep()
        state.exporter.sweep()
        models.start()
        webhooks.start()
        drift.start()
        samples.start()
        if threading.current_thread() is threading.main_thread():  # signals need it; tests use another thread
            if supervised:
                signal_when_parent_dies(signal.SIGTERM)
            _end_on_sigterm(state.event_streams.close, state.planner.stop, state.exporter.stop)
        if worker is not None:
            worker.start()
        trimming = asyncio.create_task(_return_memory())
        yield
        trimming.cancel()
        state.event_streams.close()
        if worker is not None:
            await worker.stop()
        samples.stop()
        drift.stop()
        webhooks.stop()
        models.stop()
        queue.stop()
        state.checks.stop()
        state.spec_checker.stop()
        state.planner.stop()
        state.exporter.stop()
        if state.tracing is not None:
            state.tracing.stop()

    api = Api(
        lambda: bool(database.keys.list()),
        title="finetune",
        version=__version__,
        description="Image classification with fine-tuned models. Every error is an RFC 9457 problem with a stable `code`.",
        openapi_url="/docs.json",
        docs_url=None,  # FastAPI's interactive page would load scripts from another host
        redoc_url=None,
        lifespan=lifespan,
        max_body_size=MAX_JSON_BYTES,
        generate_unique_id_function=lambda route: route.name,  # names of methods in generated clients
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    api.state.server = state
    add_handlers(api)
    api.include_router(predict_router(settings.image_limits.max_bytes + MULTIPART_OVERHEAD_BYTES))
    api.include_router(inference_v2_router(settings.image_limits.max_bytes + MULTIPART_OVERHEAD_BYTES))
    api.include_router(models_router)
    api.include_router(deployment_router)
    api.include_router(files_router(settings.max_upload_bytes + MULTIPART_OVERHEAD_BYTES))
    api.include_router(uploads_router(settings.max_upload_bytes))
    api.include_router(jobs_router)
    api.include_router(comparisons_router)
    api.include_router(plans_router)
    api.include_router(batch_router)
    api.include_router(file_checks_router)
    api.include_router(checks_router)
    api.include_router(pictures_router)
    api.include_router(webhooks_router)
    api.include_router(runs_router)
    api.include_router(server_router)
    api.mount("/static", PageFiles(), name="static")
    return api


async def _return_memory() -> None:
    """Return the free memory that replaced models and large requests leave to the kernel, periodically."""
    while True:
        await asyncio.sleep(TRIM_SECONDS)
        await asyncio.to_thread(return_free_memory)


def _streams_to_disk(method: str, path: str) -> bool:
    return method == "POST" and (path == "/v1/files" or (path.startswith("/v1/uploads/") and path.endswith("/parts")))


def _shown(state: ServerState, event: Event) -> dict[str, Any]:
    return event_document(event, state.without_home).model_dump()


def _end_on_sigterm(*ends: Callable[[], None]) -> None:
    """Call `ends` before the server stops: the server waits for open responses, and event streams do not end by themselves."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        stop = signal.getsignal(number)  # the server's own handler

        def close_first(received: int, frame: FrameType | None, stop: Any = stop) -> None:
            for end in ends:
                loop.call_soon_threadsafe(end)
            if callable(stop):
                stop(received, frame)

        signal.signal(number, close_first)
