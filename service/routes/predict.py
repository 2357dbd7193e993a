"""``/predict`` and ``/v1/models/{name}/predict``.

These are by far the most frequent requests. Their bodies and options are parsed by hand, since FastAPI's parsing of forms and
parameters takes longer than the rest of the response without the model.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from finetune.errors import NotFound
from finetune.runtime.tracing import Tracing
from service.disconnects import while_connected
from service.middleware.auth import Caller, caller_with
from service.models import LoadedModel
from service.predictions import Upload, predict, predict_one_of_several, read_upload, sample_record, timings, unasked_fields
from service.problems import RESPONSES
from service.schemas.predictions import PredictionAnswer, PredictionList, PredictOptions
from service.state import ServerState

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_OPTIONS = PredictOptions.model_json_schema()["properties"]
_LEVEL = {"type": "number", "minimum": 0.5, "maximum": 0.99}
_QUERY: dict[str, dict[str, Any]] = {
    "top_k": {"type": "integer", "minimum": 1},
    "explain": {"type": "boolean"},
    "embedding": {"type": "boolean"},
    "coverage": _LEVEL,
    "per_class": {"type": "boolean"},
    "abstain": {"type": "boolean"},
    "precision": _LEVEL,
}
_MAY_BE_NULL = ("top_k", "coverage", "abstain", "precision")  # BentoML's client sends null for options not given
_FORM_OPTIONS = {
    name: {
        **schema,
        "type": [schema["type"], "null"] if name in _MAY_BE_NULL else schema["type"],
        "description": _OPTIONS[name]["description"],
    }
    for name, schema in _QUERY.items()
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": PredictionAnswer | PredictionList, "description": "A list if the request had the field `images`."}
}
PREDICT_EXTRA: dict[str, Any] = {
    "parameters": [
        {"name": name, "in": "query", "required": False, "description": schema["description"], "schema": _QUERY[name]}
        for name, schema in _OPTIONS.items()
    ],
    "requestBody": {
        "required": True,
        "description": "A JPEG, PNG, WebP, HEIC, AVIF, BMP, GIF or TIFF file: as the form field `image`, or as the body itself; "
        "or up to 64 files, together at most 64 MiB, as the repeated form field `images`, which are answered one by one, errors "
        "included.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "images": {"type": "array", "maxItems": 64, "items": {"type": "string", "format": "binary"}},
                        **_FORM_OPTIONS,
                    },
                }
            },
            "application/octet-stream": _BINARY,
        },
    },
}


def predict_router(max_body_bytes: int) -> APIRouter:
    """Return the two predict routes, which accept large bodies."""
    router = APIRouter(tags=["predict"], responses=RESPONSES)

    @router.post("/predict", openapi_extra=PREDICT_EXTRA, max_body_size=max_body_bytes, responses=_ANSWERS)
    async def predict_with_default_model(request: Request) -> Response:
        """Classify images with the server's default model, or with the one that the server was started with."""
        server: ServerState = request.app.state.server
        caller = caller_with(request, "predict")
        choice = server.models.choose(lambda canary: server.may_use_default(caller, canary))
        if not server.may_use_default(caller, server.models.default()):
            raise NotFound("This server has no default model that you may use. GET /v1/models lists those that you may use")
        return await _answer(request, server, caller, choice.model, choice.role, choice.shadow)

    @router.post("/v1/models/{name}/predict", openapi_extra=PREDICT_EXTRA, max_body_size=max_body_bytes, responses=_ANSWERS)
    async def predict_with_named_model(request: Request, name: str) -> Response:
        """Classify images with a registered model: `name`, `name@version` or `name@alias`."""
        server: ServerState = request.app.state.server
        caller = caller_with(request, "predict")
        server.check_may_use(caller, name.partition("@")[0])
        return await _answer(request, server, caller, await server.models.get(name))

    return router


async def _answer(
    request: Request,
    server: ServerState,
    caller: Caller,
    model: LoadedModel,
    role: str = "named",
    shadow: LoadedModel | None = None,
) -> Response:
    upload = await read_upload(request)
    unasked = unasked_fields(model, upload.options)
    if upload.several:
        answer: PredictionAnswer | PredictionList = await while_connected(request, _predict_several(server, model, upload))
    else:
        answer = await server.queue.run(predict, model, upload, server.image_limits)
        if shadow is not None:
            server.shadows.compare(shadow, upload, answer)
    server.metrics.predicted(model.name, model.version, role, len(upload.stages))
    server.drift.observe(model, [stages.statistics for stages in upload.stages.values()])
    _sample(server, caller, model, upload)
    for stages in upload.stages.values():
        server.metrics.took(model.name, stages.seconds)
    if server.tracing is not None:
        _trace(server.tracing, request, model, upload)
    excluded: Any = {"data": {"__all__": {"result": unasked}}} if upload.several else unasked
    return Response(answer.model_dump_json(exclude=excluded), media_type="application/json")


def _sample(server: ServerState, caller: Caller, model: LoadedModel, upload: Upload) -> None:
    """Keep the images that are drawn, if the operator has turned sampling on."""
    for index, stages in upload.stages.items():
        if server.samples.selects(model):
            record = sample_record(model, caller.owner, stages.probs, stages.statistics)
            server.samples.submit(model, upload.images[index][1], record)


def _trace(tracing: Tracing, request: Request, model: LoadedModel, upload: Upload) -> None:
    """Record the stages of each prediction as child spans of the request's span."""
    about, parent = {"finetune.model": model.name, "finetune.version": model.version}, request.scope["state"]["span"]
    for stages in upload.stages.values():
        preprocessed = stages.ended - stages.run_seconds
        decoded = preprocessed - stages.preprocess_seconds
        tracing.add("decode", decoded - stages.decode_seconds, decoded, about, parent)
        tracing.add("preprocess", decoded, preprocessed, about, parent)
        tracing.add("inference", preprocessed, stages.ended, about, parent)


async def _predict_several(server: ServerState, model: LoadedModel, upload: Upload) -> PredictionList:
    """Predict each image separately, which is faster on a CPU than a batch."""
    items = [(model, upload, index, server.image_limits) for index in range(len(upload.images))]
    found = await server.queue.run_batch(predict_one_of_several, items)
    return PredictionList(
        model=model.name,
        version=model.version,
        data=[result for result, _, _ in found],
        n_failed=sum(result.error is not None for result, _, _ in found),
        timings=timings(sum(seconds for _, seconds, _ in found), sum(seconds for _, _, seconds in found), upload.received),
    )
