"""``/v1/models``: registered models with their versions, aliases, access rights and files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from finetune.bundle.aliases import LATEST
from finetune.bundle.card import model_card
from finetune.bundle.manifest import read_manifest
from finetune.bundle.registry import ModelVersion
from finetune.errors import Conflict, NotFound
from finetune.evaluation.predictions import read
from finetune.evaluation.tables import csv_lines
from finetune.monitoring.monitored import drift_document
from finetune.promotion import promote
from service.exports import Format, download_name
from service.middleware.auth import Caller, Reading, Submitting
from service.middleware.head import HEADERS_ONLY
from service.models import Role
from service.problems import RESPONSES
from service.results import (
    MEDIA_TYPES,
    TABLE_ANSWER,
    bundle_archive,
    evaluated_splits,
    link_of_run,
    report_answer,
    resolved_hyperparameters,
    run_of,
)
from service.schemas.drift import DriftDocument, ReferenceChoice
from service.schemas.models import (
    Abstention,
    AliasTarget,
    ModelChange,
    ModelDeleted,
    ModelDocument,
    ModelList,
    VersionDocument,
    VersionSummary,
)
from service.state import Server, ServerState

BUNDLE_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}

CARD_ANSWER: dict[int | str, dict[str, Any]] = {200: {"content": {"text/markdown": {"schema": {"type": "string"}}}}}

_IN_WORDS: dict[Role, str] = {
    "pinned": "the model that the server was started with",
    "default": "the server's default",
    "canary": "the canary of the server's default",
    "shadow": "the shadow of the server's default",
}

models_router = APIRouter(prefix="/v1/models", tags=["models"], responses=RESPONSES)


@models_router.get("")
def list_models(
    caller: Reading,
    server: Server,
    after: Annotated[str | None, Query(max_length=100, description="The `last_id` of the previous page.")] = None,
    limit: Annotated[
        int,
        Query(ge=1, le=1000, description="Items per page; large by default, because the stock client reads the first page only."),
    ] = 1000,
) -> ModelList:
    """List the registered models that you may use, by name."""
    names = [name for name in server.models.registry.names() if server.may_use(caller, name) and (after is None or name > after)]
    documents = [document for name in names[: limit + 1] if (document := model_document(server, name)) is not None]
    return ModelList.of(documents[:limit], len(documents) > limit)


@models_router.get("/{name}")
def get_model(caller: Reading, server: Server, name: str) -> ModelDocument:
    """Return one registered model with its versions."""
    return _existing(server, find_model(server, caller, name).name)


@models_router.get("/{name}/versions/{version}")
def get_version(caller: Reading, server: Server, name: str, version: str) -> VersionDocument:
    """Return the details of a version: classes, method, metrics with n and intervals, licence, parity, calibration."""
    return _version_document(server, find_model(server, caller, f"{name}@{version}"))


@models_router.put("/{name}/versions/{version}/drift/reference")
def set_drift_reference(caller: Submitting, server: Server, name: str, version: str, wanted: ReferenceChoice) -> DriftDocument:
    """Accept the last images in production as the reference of later ones, or return to the held-out images of the bundle."""
    found = find_model(server, caller, f"{name}@{version}", to_change=True)
    drift = server.drift.choose_reference(found, accept=wanted.use == "live")
    return DriftDocument.model_validate(drift_document(found, drift))


@models_router.put("/{name}/versions/{version}/abstention")
def set_abstention(caller: Submitting, server: Server, name: str, version: str, wanted: Abstention) -> VersionDocument:
    """Set the precision at which a version abstains by default; every prediction then has `abstained`."""
    found = find_model(server, caller, f"{name}@{version}", to_change=True)
    server.models.registry.set_abstention(found.name, found.version, wanted.precision)
    server.models.refresh()
    return _version_document(server, found)


@models_router.get("/{name}/versions/{version}/card", response_class=PlainTextResponse, responses=CARD_ANSWER)
def get_card(caller: Reading, server: Server, name: str, version: str) -> PlainTextResponse:
    """Return the model card as Markdown: how the model was made, its metrics, and its licence."""
    found = find_model(server, caller, f"{name}@{version}")
    return PlainTextResponse(model_card(read_manifest(found.path)), media_type="text/markdown")


@models_router.get("/{name}/versions/{version}/drift")
def get_drift(caller: Reading, server: Server, name: str, version: str) -> DriftDocument:
    """Return whether a version's predictions in production have drifted from its predictions for held-out images."""
    found = find_model(server, caller, f"{name}@{version}")
    return DriftDocument.model_validate(drift_document(found, server.drift.drift(found)))


def _version_document(server: ServerState, found: ModelVersion) -> VersionDocument:
    manifest = read_manifest(found.path)
    run = run_of(server.home / "runs", found)
    access = server.models.registry.access(found.name)
    place = f"/v1/models/{found.name}/versions/{found.version}"
    weights = dict(manifest.backbone.get("weights") or {})
    return VersionDocument(
        id=f"{found.name}@{found.version}",
        model=found.name,
        version=found.version,
        created=int(found.created_at),
        aliases=list(found.aliases),
        owned_by=access.owner or "finetune",
        visibility=access.visibility,
        classes=list(manifest.classes),
        method=dict(manifest.method),
        hyperparameters={} if run is None else resolved_hyperparameters(run),
        backbone=str(manifest.backbone["name"]),
        weights=weights,
        license=weights.get("license"),
        input_size_px=list(manifest.preprocess.input_size_px),
        metrics=dict(manifest.metrics),
        splits=evaluated_splits(run),
        calibration=dict(manifest.calibration),
        abstain_precision=manifest.abstain.get("precision"),
        parity=dict(manifest.parity),
        explanation=dict(manifest.cam),
        versions=dict(manifest.versions),
        bundle_bytes=sum((found.path / file).stat().st_size for file in manifest.files),
        exports=list(server.exporter.available()),
        links={
            "report": f"{place}/report" if run is not None and run.report.exists() else None,
            "bundle": f"{place}/bundle",
            "predictions": f"{place}/predictions" if server.models.registry.predictions_of(found).exists() else None,
            "card": f"{place}/card",
            "job": None if run is None else link_of_run(server.home / "runs", run.root),
        },
    )


@models_router.get("/{name}/versions/{version}/report", response_class=HTMLResponse)
def get_report(caller: Reading, server: Server, name: str, version: str) -> HTMLResponse:
    """Return the report of the run that made a version, as one self-contained page."""
    found = find_model(server, caller, f"{name}@{version}")
    run = run_of(server.home / "runs", found)
    if run is None or not run.report.exists():
        raise NotFound(
            f"{found.name}@{found.version} has no report here: the folder of its run is gone, or it was registered by hand"
        )
    return report_answer(run, server.without_home)


@models_router.get("/{name}/versions/{version}/bundle", response_class=StreamingResponse, responses=BUNDLE_ANSWER)
def get_bundle(caller: Reading, server: Server, name: str, version: str) -> StreamingResponse:
    """Download the bundle of a version as a tar file: model, manifest, self-test, card, calibration."""
    found = find_model(server, caller, f"{name}@{version}")
    pieces, size = bundle_archive(found, read_manifest(found.path))
    headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{found.name}-{found.version}.tar"'}
    return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)


@models_router.get("/{name}/versions/{version}/exports/{format}", response_class=StreamingResponse, responses=BUNDLE_ANSWER)
async def get_export(
    request: Request,
    caller: Reading,
    server: Server,
    name: str,
    version: str,
    format: Annotated[Format, PathParameter(description="`web` is one HTML file; the others are zip files.")],
) -> StreamingResponse:
    """Download a version in the format of another tool, as `finetune export` writes it. It is written for each request."""
    found = await run_in_threadpool(find_model, server, caller, f"{name}@{version}")
    if request.scope["state"].get(HEADERS_ONLY, False):  # the size is known only after the work
        server.exporter.check_available(format)
        headers = {"Content-Disposition": f'attachment; filename="{download_name(found, format)}"'}
        return StreamingResponse(iter(()), media_type="application/octet-stream", headers=headers)
    exported = await server.exporter.write(found, format, caller.owner)
    headers = {"Content-Length": str(exported.size_bytes), "Content-Disposition": f'attachment; filename="{exported.filename}"'}
    return StreamingResponse(exported.chunks(), media_type="application/octet-stream", headers=headers)


@models_router.get("/{name}/versions/{version}/files/{file}", response_class=FileResponse, responses=BUNDLE_ANSWER)
def get_bundle_file(caller: Reading, server: Server, name: str, version: str, file: str) -> FileResponse:
    """Download one file of a version's bundle, such as `model.onnx` (to run) or `weights.safetensors` (to train further)."""
    found = find_model(server, caller, f"{name}@{version}")
    files = read_manifest(found.path).files
    if file not in files:
        raise NotFound(f"{found.name}@{found.version} has no file {file[:100]!r}; its files are {', '.join(sorted(files))}")
    return FileResponse(found.path / file, media_type="application/octet-stream", filename=f"{found.name}-{found.version}-{file}")


@models_router.get("/{name}/versions/{version}/predictions", response_class=StreamingResponse, responses=TABLE_ANSWER)
def get_predictions(
    caller: Reading,
    server: Server,
    name: str,
    version: str,
    format: Annotated[Literal["csv", "npz"], Query(description="`npz` contains the logits and embeddings.")] = "csv",
) -> Response:
    """Download a version's predictions for its test images, one row per image. Later versions are compared with them."""
    found = find_model(server, caller, f"{name}@{version}")
    path = server.models.registry.predictions_of(found)
    if not path.exists():
        raise NotFound(f"{found.name}@{found.version} has no answers here: it was evaluated on no test images")
    filename = f"{found.name}-{found.version}.{format}"
    if format == "npz":
        return FileResponse(path, media_type=MEDIA_TYPES[format], filename=filename)
    temperature = float(read_manifest(found.path).calibration.get("temperature", 1.0))
    headers = {"Content-Disposition": f'attachment; filename="{filename}"'}
    return StreamingResponse(csv_lines(read(path), temperature), media_type=MEDIA_TYPES[format], headers=headers)


@models_router.patch("/{name}")
def change_model(caller: Submitting, server: Server, name: str, change: ModelChange) -> ModelDocument:
    """Share a model with everyone who may use the server, or make it private to its owner again."""
    found = find_model(server, caller, name, to_change=True)
    registry = server.models.registry
    if change.visibility == "private" and (role := _answering_role(server, found.name)) is not None:
        raise Conflict(f"{found.name} is {_IN_WORDS[role]}, which answers everybody. Deploy another model first")
    registry.set_access(found.name, dataclasses.replace(registry.access(found.name), visibility=change.visibility))
    server.access.forget(found.name)
    return _existing(server, found.name)


@models_router.delete("/{name}")
def delete_model(
    caller: Submitting,
    server: Server,
    name: str,
    force: Annotated[
        bool,
        Query(
            description="Delete it even if an alias points at it, if an unfinished batch prediction needs it or, for "
            "administrators, if it is the server's default or its canary."
        ),
    ] = False,
) -> ModelDeleted:
    """Delete a model, or one version of it (`name@version`). Requests in progress are completed."""
    found = find_model(server, caller, name, to_change=True)
    registry = server.models.registry
    if "@" in name:
        promoted = sorted(set(found.aliases) - {LATEST})
        if promoted and not force:
            raise Conflict(f"aliases point at {name}: {', '.join(promoted)}. Promote another version first, or add ?force=true")
        _check_not_answering(server, caller, found.name, found.version, force=force)
        _check_not_awaited(server, caller, found.name, found.version, force=force)
        registry.delete(found.name, found.version, force=True)
    else:
        _check_not_answering(server, caller, found.name, None, force=force)
        _check_not_awaited(server, caller, found.name, None, force=force)
        registry.delete(found.name, force=True)
    server.models.refresh()
    server.access.forget(found.name)
    return ModelDeleted(id=name)


def _check_not_answering(server: ServerState, caller: Caller, name: str, version: str | None, *, force: bool) -> None:
    """Raise `Conflict` if requests without a model name would lose their model, unless an administrator forces it."""
    role = _answering_role(server, name, version)
    if role is not None and not (force and caller.is_admin):
        otherwise = ", or add ?force=true" if caller.is_admin else "; that takes a key with the scope 'admin'"
        raise Conflict(
            f"{name if version is None else f'{name}@{version}'} is {_IN_WORDS[role]}. Deploy another model first{otherwise}"
        )


def _check_not_awaited(server: ServerState, caller: Caller, name: str, version: str | None, *, force: bool) -> None:
    """Raise `Conflict` if an unfinished batch prediction would lose its model, unless it is forced."""
    batches = [] if force else server.database.jobs.batches_with(name, version)
    if batches:
        mine = next((job.id for job in batches if caller.sees in (None, job.owner)), None)
        needing = f"the batch prediction {mine}" if mine is not None else "a batch prediction of somebody else"
        what = name if version is None else f"{name}@{version}"
        raise Conflict(f"{what} is needed by {needing}, which has not finished. Wait for its end, cancel it, or add ?force=true")


def _answering_role(server: ServerState, name: str, version: str | None = None) -> Role | None:
    """Return the role in which a model, or one version of it, answers requests without a model name; None if it does not."""
    for deployed in server.models.deployed():
        if deployed.role != "shadow" and deployed.reference.partition("@")[0] == name:
            with contextlib.suppress(NotFound):  # the deployed version was deleted
                if version in (None, server.models.registry.lookup(deployed.reference).version):
                    return deployed.role
    return None


@models_router.put("/{name}/aliases/{alias}")
def put_alias(caller: Submitting, server: Server, name: str, alias: str, target: AliasTarget) -> ModelDocument:
    """Promote a version: point an alias at it, from the next request on. A name without alias or version means `champion`.

    A version that fails a check is refused, and the alias is unchanged.
    """
    found = find_model(server, caller, name, to_change=True)
    promote(
        server.models.registry, found.name, target.version, alias, minimum=target.minimum, force=target.force, by=caller.owner
    )
    server.models.refresh()
    return _existing(server, found.name)


@models_router.post("/{name}/aliases/{alias}/rollback")
def roll_back_alias(caller: Submitting, server: Server, name: str, alias: str) -> ModelDocument:
    """Point an alias back at its previous version."""
    found = find_model(server, caller, name, to_change=True)
    server.models.registry.rollback(found.name, alias, by=caller.owner)
    server.models.refresh()
    return _existing(server, found.name)


def find_model(server: ServerState, caller: Caller, reference: str, *, to_change: bool = False) -> ModelVersion:
    """Resolve a model reference for this caller.

    Raises:
        NotFound: there is no such model, or it is another owner's private one.
        HTTPException: 403 for a change of another owner's shared model.
    """
    name = reference.partition("@")[0]
    server.check_may_use(caller, name)
    found = server.models.find(reference)
    if to_change and not server.may_change(caller, name):
        raise HTTPException(403, f"{name} was not made by a job of yours, so changing it takes a key with the scope 'admin'")
    return found


def model_document(server: ServerState, name: str) -> ModelDocument | None:
    """Return the document of a model, or None if it was deleted in the meantime."""
    versions = server.models.registry.versions(name)
    return _document(server, name, versions) if versions else None


def _existing(server: ServerState, name: str) -> ModelDocument:
    document = model_document(server, name)
    if document is None:
        raise NotFound(f"no model {name!r}")
    return document


def _document(server: ServerState, name: str, versions: Sequence[ModelVersion]) -> ModelDocument:
    live, refused = set(server.models.loaded()), server.models.refused()
    access = server.models.registry.access(name)
    return ModelDocument(
        id=name,
        created=int(versions[-1].created_at),
        owned_by=access.owner or "finetune",
        visibility=access.visibility,
        versions=[
            VersionSummary(
                version=one.version,
                created=int(one.created_at),
                aliases=list(one.aliases),
                live=(one.name, one.version) in live,
                refused=refused.get((one.name, one.version)),
            )
            for one in reversed(versions)
        ],
    )
