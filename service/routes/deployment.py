"""``/v1/deployments/default``: the model for requests without a model name, with its canary and shadow."""

from __future__ import annotations

from fastapi import APIRouter

from finetune.bundle.deployment import Deployment, Share, deployments, roll_back
from finetune.errors import Conflict, NotReady
from finetune.promotion import promote_to_default
from service.middleware.auth import Administering, Caller, Reading
from service.problems import RESPONSES
from service.schemas.models import DeploymentChange, DeploymentDocument, DeploymentHistory, PastDeployment, ShareDocument
from service.state import Server, ServerState

deployment_router = APIRouter(prefix="/v1/deployments", tags=["models"], responses=RESPONSES)


@deployment_router.get("/default")
def get_default(caller: Reading, server: Server) -> DeploymentDocument:
    """Return the deployment for requests without a model name."""
    return _document(server, caller)


@deployment_router.get("/default/history")
def default_history(caller: Reading, server: Server) -> DeploymentHistory:
    """List the changes of the default deployment, with time and author, for models that you may use."""
    past = [
        PastDeployment(reference=one.deployment.reference, at=int(one.at), by=one.by)
        for one in reversed(deployments(server.models.registry))
        if server.may_use(caller, one.deployment.reference.partition("@")[0])
    ]
    return DeploymentHistory(data=past)


@deployment_router.put("/default")
def put_default(caller: Administering, server: Server, change: DeploymentChange) -> DeploymentDocument:
    """Promote a model to the default for requests without a model name. Registering a model never does this."""
    _refuse_if_pinned(server)
    deployment = Deployment(change.reference, canary=_share(change.canary), shadow=_share(change.shadow))
    promote_to_default(server.models.registry, deployment, minimum=change.minimum, force=change.force, by=caller.owner)
    server.models.refresh()
    return _document(server, caller)


@deployment_router.post("/default/rollback")
def roll_back_default(caller: Administering, server: Server) -> DeploymentDocument:
    """Restore the previous default deployment."""
    _refuse_if_pinned(server)
    roll_back(server.models.registry, by=caller.owner)
    server.models.refresh()
    return _document(server, caller)


def _refuse_if_pinned(server: ServerState) -> None:
    if server.models.pinned is not None:
        raise Conflict("This server was started with --model, which fixes what it answers with. Start it without, then promote")


def _share(given: ShareDocument | None) -> Share | None:
    return None if given is None else Share(given.reference, given.percent)


def _document(server: ServerState, caller: Caller) -> DeploymentDocument:
    deployed, pinned = server.models.deployment(), server.models.pinned is not None
    try:
        model = server.models.default()
    except NotReady:
        model = None
    visible = model is not None and server.may_use_default(caller, model)
    shares = (deployed.canary, deployed.shadow) if deployed is not None and visible and not pinned else (None, None)
    canary, shadow = (
        None
        if share is None or not server.may_use(caller, share.reference.partition("@")[0])
        else ShareDocument(reference=share.reference, percent=share.percent)
        for share in shares
    )
    reference = server.models.pinned if pinned else None if deployed is None else deployed.reference
    return DeploymentDocument(
        reference=(reference or model.name) if visible and model is not None else None,
        model=model.name if visible and model is not None else None,
        version=model.version if visible and model is not None else None,
        pinned=pinned,
        canary=canary,
        shadow=shadow,
    )
