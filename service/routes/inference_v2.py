"""``/v2``: the Open Inference Protocol, for clients of other inference servers (``tritonclient[http]``)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from finetune import __version__
from finetune.errors import BundleError, NotFound, NotReady
from service.middleware.auth import Caller, caller_with
from service.models import LoadedModel
from service.oip import HEADER_LENGTH, infer, model_metadata, parse_request, server_metadata
from service.predictions import sample_record, statistics_of_model
from service.problems import INFERENCE_RESPONSES
from service.state import ServerState

_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A request of the Open Inference Protocol with the input `images`: UINT8 pixels (N × height × width × 3), "
        "or BYTES encoded files (N). Binary tensors follow the JSON, whose length is in Inference-Header-Content-Length.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_DOCUMENT: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {"schema": {"type": "object"}}}}}


def inference_v2_router(max_body_bytes: int) -> APIRouter:
    """Return the routes of the protocol. Only inference accepts large bodies."""
    router = APIRouter(prefix="/v2", tags=["open inference protocol"], responses=INFERENCE_RESPONSES)

    @router.get("", responses=_DOCUMENT)
    async def v2_server(request: Request) -> JSONResponse:
        """Return the server's name, version and extensions."""
        caller_with(request, "predict")
        return JSONResponse(server_metadata(__version__))

    @router.get("/health/live", response_class=Response)
    async def v2_live() -> Response:
        """Report that the process responds."""
        return Response()

    @router.get("/health/ready", response_class=Response)
    async def v2_ready(request: Request) -> Response:
        """Return 200 if the default model has passed its self-test, else 503."""
        _state(request).models.check_ready()
        return Response()

    @router.get("/models/{name}/ready", response_class=Response)
    @router.get("/models/{name}/versions/{version}/ready", name="v2_version_ready", response_class=Response)
    async def v2_model_ready(request: Request, name: str, version: str = "") -> Response:
        """Load a model and return 200 if it passes its checks, else 503."""
        try:
            await _model(request, name, version)
        except BundleError as error:
            raise NotReady(error.message) from None
        return Response()

    @router.get("/models/{name}", responses=_DOCUMENT)
    @router.get("/models/{name}/versions/{version}", name="v2_version", responses=_DOCUMENT)
    async def v2_model(request: Request, name: str, version: str = "") -> JSONResponse:
        """Return the metadata of a model's inputs and outputs."""
        model = await _model(request, name, version)
        versions = [one.version for one in _state(request).models.registry.versions(model.name)]
        return JSONResponse(model_metadata(model, versions))

    @router.post("/models/{name}/infer", openapi_extra=_BODY, max_body_size=max_body_bytes, responses=_DOCUMENT)
    @router.post(
        "/models/{name}/versions/{version}/infer",
        name="v2_version_infer",
        openapi_extra=_BODY,
        max_body_size=max_body_bytes,
        responses=_DOCUMENT,
    )
    async def v2_infer(request: Request, name: str, version: str = "") -> Response:
        """Run a model on a batch of pixels or of encoded files."""
        server = _state(request)
        model = await _model(request, name, version)
        asked = parse_request(await request.body(), request.headers.get(HEADER_LENGTH))
        body, head_length, found = await server.queue.run(infer, model, asked, server.image_limits, n_items=asked.n_images)
        server.metrics.predicted(model.name, model.version, "named", asked.n_images)
        statistics = statistics_of_model(model, found.probs, found.embedding)
        server.drift.observe(model, [statistics])
        for row, data in enumerate(asked.files):
            if server.samples.selects(model):
                record = sample_record(model, caller_with(request, "predict").owner, found.probs[row], statistics.row(row))
                server.samples.submit(model, data, record)
        if head_length is None:
            return Response(body, media_type="application/json")
        return Response(body, media_type="application/octet-stream", headers={HEADER_LENGTH: str(head_length)})

    return router


def _state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


async def _model(request: Request, name: str, version: str) -> LoadedModel:
    server, caller = _state(request), caller_with(request, "predict")
    _check(server, caller, name)
    return await server.models.get(f"{name}@{version}" if version else name)


def _check(server: ServerState, caller: Caller, name: str) -> None:
    if "@" in name:
        raise NotFound(f"no model {name[:100]!r}: a version is named as /v2/models/NAME/versions/VERSION")
    server.check_may_use(caller, name)
