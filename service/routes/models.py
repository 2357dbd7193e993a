"""``/v1/models``: what is registered, and which version an alias means. Each route translates one request to one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from finetune.bundle.registry import LATEST, ModelVersion
from finetune.errors import BundleError, Conflict, NotFound
from service.middleware.auth import Caller, Reading, Submitting
from service.models import LiveModels
from service.problems import RESPONSES
from service.schemas.lists import ListItem, Page
from service.state import Server, ServerState


class VersionDocument(BaseModel):
    version: str
    created: int = Field(description="Unix seconds.")
    aliases: list[str]
    live: bool = Field(description="In memory now.")
    refused: str | None = Field(description="Why the server does not serve this version although it was asked to.")


class ModelDocument(ListItem):
    """A registered model, in the words of the public fine-tuning API (`id`, `object`, `created`, `owned_by`) and our own."""

    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds, of the newest version.")
    owned_by: str
    versions: list[VersionDocument] = Field(description="Newest first.")


ModelList = Page[ModelDocument]


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class AliasTarget(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: str = Field(min_length=1, max_length=63, description="A version's number, or an alias that means it.")


models_router = APIRouter(prefix="/v1/models", tags=["models"], responses=RESPONSES)


@models_router.get("")
def list_models(
    caller: Reading,
    server: Server,
    after: Annotated[str | None, Query(description="The `last_id` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="The stock client does not turn pages, so a page is long.")] = 1000,
) -> ModelList:
    """Registered models by name."""
    documents = [one for one in _documents(server.models, server.models.registry.list()) if server.may_use(caller, one.id)]
    rest = [document for document in documents if after is None or document.id > after]
    page = rest[:limit]
    return ModelList.of(page, len(rest) > len(page))


@models_router.get("/{name}")
def get_model(caller: Reading, server: Server, name: str) -> ModelDocument:
    """One registered model with its versions."""
    return _model(server, _find(server, caller, name).name)


@models_router.delete("/{name}")
def delete_model(
    caller: Submitting,
    server: Server,
    name: str,
    force: Annotated[bool, Query(description="Also if an alias such as `champion` means it.")] = False,
) -> ModelDeleted:
    """Delete a model, or one version of it (`name@version`). Requests that it is answering now are answered."""
    found = _find(server, caller, name, to_change=True)
    version = found.version if "@" in name else None
    doomed = [one for one in server.models.registry.list() if one.name == found.name and version in (None, one.version)]
    promoted = sorted({alias for one in doomed for alias in one.aliases} - {LATEST})
    if promoted and not force:
        raise Conflict(f"{name} is what {', '.join(promoted)} means. Move the alias first, or add ?force=true")
    server.models.registry.delete(found.name, version, force=True)
    server.models.refresh()
    return ModelDeleted(id=name)


@models_router.put("/{name}/aliases/{alias}")
def put_alias(caller: Submitting, server: Server, name: str, alias: str, target: AliasTarget) -> ModelDocument:
    """Make an alias mean a version, from the next request on. `champion` is what the bare name answers with. A version that fails
    its checks is refused, and the alias stays where it is."""
    found = _find(server, caller, name, to_change=True)
    live = server.models.named(f"{found.name}@{target.version}")
    if live.version != server.models.find(f"{found.name}@{target.version}").version:
        raise BundleError(f"{found.name}@{target.version} failed its checks; the alias stays where it is")
    server.models.registry.set_alias(found.name, alias, target.version)
    server.models.refresh()
    return _model(server, found.name)


def _find(server: ServerState, caller: Caller, reference: str, *, to_change: bool = False) -> ModelVersion:
    """What a reference means to this caller.

    Raises:
        NotFound: no such model, or another owner's.
        HTTPException: 403 to change what belongs to no owner.
    """
    name = reference.partition("@")[0]
    server.check_may_use(caller, name)
    found = server.models.find(reference)
    if to_change and not server.may_change(caller, name):
        raise HTTPException(403, f"{name} was not made by a job of yours, so changing it takes a key with the scope 'admin'")
    return found


def _model(server: ServerState, name: str) -> ModelDocument:
    versions = [version for version in server.models.registry.list() if version.name == name]
    if not versions:
        raise NotFound(f"no model {name!r}")
    return _documents(server.models, versions)[0]


def _documents(models: LiveModels, versions: Sequence[ModelVersion]) -> list[ModelDocument]:
    live, refused = set(models.loaded()), models.refused()
    by_name: dict[str, list[ModelVersion]] = {}
    for version in reversed(versions):
        by_name.setdefault(version.name, []).append(version)
    return [
        ModelDocument(
            id=name,
            created=int(of_name[0].created_at),
            owned_by="finetune",
            versions=[
                VersionDocument(
                    version=one.version,
                    created=int(one.created_at),
                    aliases=list(one.aliases),
                    live=(one.name, one.version) in live,
                    refused=refused.get((one.name, one.version)),
                )
                for one in of_name
            ],
        )
        for name, of_name in sorted(by_name.items())
    ]
