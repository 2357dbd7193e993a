"""``/predict`` and ``/v1/models/{name}/predict``."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from finetune.errors import NotFound
from service.middleware.auth import Predicting
from service.models import LoadedModel
from service.predictions import predict, read_upload
from service.problems import RESPONSES
from service.schemas.predictions import PredictionAnswer, PredictOptions
from service.state import Server, ServerState

Options = Annotated[PredictOptions, Query()]

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
        """Classify one image with the server's default model, or with the one that the server was started with."""
        choice = server.models.choose()
        for model in (server.models.default(), choice.model):
            if not server.may_use_default(caller, model):
                raise NotFound("This server has no default model that you may use. GET /v1/models lists those that you may use")
        return await _predict(request, options, server, choice.model, choice.role, choice.shadow)

    @router.post("/v1/models/{name}/predict", openapi_extra=PREDICT_BODY, max_body_size=max_body_bytes)
    async def predict_with_named_model(
        request: Request, name: str, options: Options, caller: Predicting, server: Server
    ) -> PredictionAnswer:
        """Classify one image with a registered model: `name`, `name@version` or `name@alias`."""
        server.check_may_use(caller, name.partition("@")[0])
        return await _predict(request, options, server, await server.models.get(name))

    return router


async def _predict(
    request: Request,
    options: PredictOptions,
    server: ServerState,
    model: LoadedModel,
    role: str = "named",
    shadow: LoadedModel | None = None,
) -> PredictionAnswer:
    upload = await read_upload(request, options)
    answer = await server.queue.run(predict, model, upload, server.image_limits)
    server.metrics.predictions.labels(model.name, model.version, role).inc()
    if shadow is not None:
        server.shadows.compare(shadow, upload, answer)
    return answer
