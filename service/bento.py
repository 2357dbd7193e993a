"""An ASGI application as a BentoML service. Imported only where BentoML itself is used."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import bentoml
from _bentoml_sdk import Service as BentoService
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from service.predictions import Upload, predict
from service.schemas.predictions import Explanation, LabelProbability, PredictOptions, Timings
from service.state import ServerState


class ClientAnswer(BaseModel):
    """The part of a prediction that BentoML's client can decode, which does not support lists that may be null."""

    model: str
    version: str
    predictions: list[LabelProbability]
    labels: list[str] = []  # the predicted labels of a multi-label model
    explanation: Explanation | None
    timings: Timings


class _LifespanToBento:
    """Passes lifespan events to BentoML, which forwards them to the mounted app, and all requests to `app`."""

    def __init__(self, bento: ASGIApp, app: ASGIApp) -> None:
        self.bento = bento
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.bento if scope["type"] == "lifespan" else self.app)(scope, receive, send)


def build_service(app: ASGIApp, api: FastAPI, *, threads: int = 1) -> BentoService[Any]:
    """Return the BentoML service for an application: one process, `threads` predictions at a time.

    Args:
        app: the application that handles requests.
        api: the FastAPI app inside it, whose lifespan BentoML runs.
    """

    class WrappedService(BentoService[Any]):
        def to_asgi(self, is_main: bool = True) -> ASGIApp:
            return _LifespanToBento(super().to_asgi(is_main=is_main), app)

    @bentoml.service(
        name="finetune",
        service_class=WrappedService,
        workers=1,  # each worker would load all models again; ONNX Runtime releases the GIL, so threads can use all cores
        threads=threads,
        metrics={"enabled": False},
        monitoring={"enabled": False},
        logging={"access": {"enabled": False}},
    )
    @bentoml.asgi_app(api)
    class FinetuneService:
        @bentoml.api  # type: ignore[untyped-decorator]
        def predict(self, image: Path, top_k: int | None = None, explain: bool = False) -> ClientAnswer:
            """Classify one image file: the most probable classes and, with `explain`, where the model looked."""
            state: ServerState = api.state.server
            upload = Upload(
                ((image.name, image.read_bytes()),),
                PredictOptions.model_validate({"top_k": top_k, "explain": explain}),
                time.perf_counter(),
            )
            answer = predict(state.models.default(), upload, state.image_limits)
            found = answer.model_dump(include=set(ClientAnswer.model_fields))
            return ClientAnswer.model_validate({**found, "labels": found["labels"] or []})

    return FinetuneService


@cache
def client_schema() -> dict[str, Any]:
    """Return the schema that BentoML's own client reads before its first call."""

    bare = FastAPI()
    schema: dict[str, Any] = build_service(bare, bare).schema()
    return schema
