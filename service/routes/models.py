"""``/v1/models``: what is registered, who may use it, and which version an alias means."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.exceptions import HTTPException

from finetune.bundle.promotion import promote
from finetune.bundle.registry import LATEST, ModelVersion
from finetune.errors import Conflict, NotFound
from service.middleware.auth import Caller, Reading, Submitting
from service.problems import RESPONSES
from service.schemas.models import AliasTarget, ModelChange, ModelDeleted, ModelDocument, ModelList, VersionSummary
from service.state import Server, ServerState

models_router = APIRouter(prefix="/v1/models", tags=["models"], responses=RESPONSES)


@models_router.get("")
def list_models(
    caller: Reading,
    server: Server,
    after: Annotated[str | None, Query(max_length=100, description="The `last_id` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="The stock client does not turn pages, so a page is long.")] = 1000,
) -> ModelList:
    """List the registered models that you may use, by name."""
    names = [name for name in server.models.registry.names() if server.may_use(caller, name) and (after is None or name > after)]
    documents = [document for name in names[: limit + 1] if (document := model_document(server, name)) is not None]
    return ModelList.of(documents[:limit], len(documents) > limit)


@models_router.get("/{name}")
def get_model(caller: Reading, server: Server, name: str) -> ModelDocument:
    """Return one registered model with its versions."""
    return _existing(server, find_model(server, caller, name).name)


@models_router.patch("/{name}")
def change_model(caller: Submitting, server: Server, name: str, change: ModelChange) -> ModelDocument:
    """Share a model with everyone who may use the server, or make it private to its owner again."""
    found = find_model(server, caller, name, to_change=True)
    registry = server.models.registry
    deployed = server.models.deployment()
    if change.visibility == "private" and deployed is not None and deployed.reference.partition("@")[0] == found.name:
        raise Conflict(f"{found.name} is the server's default, which answers everybody. Deploy another model first")
    registry.set_access(found.name, dataclasses.replace(registry.access(found.name), visibility=change.visibility))
    server.access.forget(found.name)
    return _existing(server, found.name)


@models_router.delete("/{name}")
def delete_model(
    caller: Submitting,
    server: Server,
    name: str,
    force: Annotated[
        bool, Query(description="Also if it is the server's default, or if an alias such as `champion` means it.")
    ] = False,
) -> ModelDeleted:
    """Delete a model, or one version of it (`name@version`). Requests that it is answering now are answered."""
    found = find_model(server, caller, name, to_change=True)
    registry = server.models.registry
    if "@" in name:
        promoted = sorted(set(found.aliases) - {LATEST})
        if promoted and not force:
            raise Conflict(f"{name} is what {', '.join(promoted)} means. Promote another version first, or add ?force=true")
        registry.delete(found.name, found.version, force=True)
    else:
        deployed = server.models.deployment()
        if deployed is not None and deployed.reference.partition("@")[0] == found.name and not force:
            raise Conflict(f"{found.name} is the server's default. Deploy another model first, or add ?force=true")
        registry.delete(found.name, force=True)
    server.models.refresh()
    server.access.forget(found.name)
    return ModelDeleted(id=name)


@models_router.put("/{name}/aliases/{alias}")
def put_alias(caller: Submitting, server: Server, name: str, alias: str, target: AliasTarget) -> ModelDocument:
    """Promote a version: make an alias mean it, from the next request on. `champion` is what the bare name answers with. A
    version
    that fails a check is refused, and the alias keeps its meaning."""
    found = find_model(server, caller, name, to_change=True)
    promote(
        server.models.registry, found.name, target.version, alias, minimum=target.minimum, force=target.force, by=caller.owner
    )
    server.models.refresh()
    return _existing(server, found.name)


@models_router.post("/{name}/aliases/{alias}/rollback")
def roll_back_alias(caller: Submitting, server: Server, name: str, alias: str) -> ModelDocument:
    """Make an alias mean the version that it meant before."""
    found = find_model(server, caller, name, to_change=True)
    server.models.registry.rollback(found.name, alias, by=caller.owner)
    server.models.refresh()
    return _existing(server, found.name)


def find_model(server: ServerState, caller: Caller, reference: str, *, to_change: bool = False) -> ModelVersion:
    """Return what a reference means to this caller.

    Raises:
        NotFound: no such model, or another owner's private one.
        HTTPException: 403 to change a shared model of somebody else.
    """
    name = reference.partition("@")[0]
    server.check_may_use(caller, name)
    found = server.models.find(reference)
    if to_change and not server.may_change(caller, name):
        raise HTTPException(403, f"{name} was not made by a job of yours, so changing it takes a key with the scope 'admin'")
    return found


def model_document(server: ServerState, name: str) -> ModelDocument | None:
    """Return the document of a model, or None if it was deleted meanwhile."""
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
