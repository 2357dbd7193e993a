"""Predicting, and what the server says of itself: each route translates a request to one call and the result to one answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from service.auth import Predicting
from service.metrics import CONTENT_TYPE
from service.models import Live
from service.parts import Parts, Server
from service.predictions import PredictionAnswer, PredictOptions, predict, read_upload
from service.problems import RESPONSES

STATIC = Path(__file__).parent / "static"


Options = Annotated[PredictOptions, Query()]

# --- predict --------------------------------------------------------------------------------------

_BINARY = {"schema": {"type": "string", "format": "binary"}}
PREDICT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A JPEG, PNG, WebP, BMP, GIF or TIFF file: as the form field `image`, or as the body itself.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "additionalProperties": False,
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "top_k": {"type": ["integer", "null"], "minimum": 1},
                        "explain": {"enum": [True, False, 1, 0, None]},
                    },
                }
            },
            "image/*": _BINARY,
            "application/octet-stream": _BINARY,
        },
    }
}


def predict_router(max_body_bytes: int) -> APIRouter:
    """The two predict routes, the only ones that take a body of an image's size."""
    router = APIRouter(tags=["predict"], responses=RESPONSES)

    @router.post("/predict", openapi_extra=PREDICT_BODY, max_body_size=max_body_bytes)
    async def predict_with_default_model(
        request: Request, options: Options, caller: Predicting, server: Server
    ) -> PredictionAnswer:
        """Classify one image with the model that this server was started with, or the newest one."""
        live = server.models.default()
        if not server.default_is_chosen and not caller.is_admin:
            await run_in_threadpool(server.check_may_use, caller, live.name)
        return await _predict(request, options, server, live)

    @router.post("/v1/models/{name}/predict", openapi_extra=PREDICT_BODY, max_body_size=max_body_bytes)
    async def predict_with_named_model(
        request: Request, name: str, options: Options, caller: Predicting, server: Server
    ) -> PredictionAnswer:
        """Classify one image with a registered model: `name`, `name@version` or `name@alias`."""
        if not caller.is_admin:
            await run_in_threadpool(server.check_may_use, caller, name.partition("@")[0])
        live = await run_in_threadpool(server.models.named, name)  # the first time, this loads the bundle
        return await _predict(request, options, server, live)

    return router


async def _predict(request: Request, options: PredictOptions, server: Parts, live: Live) -> PredictionAnswer:
    upload = await read_upload(request, options)
    answer = await server.slots.run(predict, live, upload, server.image_limits)
    server.metrics.predictions.labels(live.name).inc()
    return answer


# --- the server itself ----------------------------------------------------------------------------


class Status(BaseModel):
    status: Literal["ok"] = "ok"


server_router = APIRouter(tags=["server"], responses={"5XX": RESPONSES["5XX"]})


@server_router.get("/livez")
async def alive() -> Status:
    """The process answers."""
    return Status()


@server_router.get("/readyz")
async def ready(server: Server) -> Status:
    """The default model has passed its probes; until then 503, with what is missing."""
    server.models.check_ready()
    return Status()


@server_router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, "4XX": RESPONSES["4XX"]},
)
def metrics(server: Server) -> Response:
    """Counters for Prometheus."""
    return Response(server.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


@server_router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})
