"""The deployed model: the default reference in ``models/default.json``, with an optional canary and shadow. Torch-free.

``POST /predict`` without a model name is answered by the default reference. It changes only by a deployment, and every change is
recorded in ``default.jsonl``. A canary answers a share of these requests instead of the default. A shadow predicts a share of
them in addition, for comparison; its predictions are not returned to clients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from finetune.errors import Conflict, NotFound
from finetune.storage.files import file_lock, write_json
from finetune.storage.journal import append_line, read_lines

if TYPE_CHECKING:
    from finetune.bundle.registry import Registry

_DEFAULT = "default.json"
JOURNAL = "default.jsonl"

_Reference = Annotated[str, Field(min_length=1, max_length=127)]
_Percent = Annotated[float, Field(ge=0.0, le=100.0)]


@dataclass(frozen=True)
class Share:
    """A canary or shadow: a model that receives a share of the requests for the default."""

    reference: _Reference
    percent: _Percent


@dataclass(frozen=True)
class Deployment:
    """The models that answer requests without a model name."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    reference: _Reference
    canary: Share | None = None
    shadow: Share | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_ADAPTER = TypeAdapter(Deployment)


def read_deployment(registry: Registry) -> Deployment | None:
    """Return the current deployment, from the journal if ``default.json`` is damaged; None if there is none."""
    try:
        return _ADAPTER.validate_json((registry.root / _DEFAULT).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        past = _history(registry)
        return past[-1] if past else None


def default_reference(registry: Registry) -> str:
    """Return the default reference: the deployed one or, without a deployment, the only registered model.

    Raises:
        NotFound: no model is registered, or there are several and none was deployed.
    """
    deployed = read_deployment(registry)
    if deployed is not None:
        return deployed.reference
    names = registry.names()
    if not names:
        raise NotFound(
            f"no model is registered in {registry.root}: train one with finetune train, or see it all with finetune demo"
        )
    if len(names) > 1:
        raise NotFound(
            f"no default is chosen, and there are several models ({', '.join(names)}). "
            "Choose one: finetune models promote NAME --default"
        )
    return names[0]


def deploy(registry: Registry, deployment: Deployment, **audit: Any) -> Deployment:
    """Deploy models, which takes effect with the next request.

    Args:
        audit: who deployed them and why, for the journal.

    Raises:
        NotFound: a reference does not name a registered version.
    """
    shares = [share.reference for share in (deployment.canary, deployment.shadow) if share is not None]
    for reference in (deployment.reference, *shares):
        registry.lookup(reference)
    with file_lock(registry.root / ".lock"):
        _write(registry, deployment, **audit)
    return deployment


def deploy_first(registry: Registry, name: str) -> None:
    """Deploy the model `name` if it is the first in the registry; if one other model is there, not deployed, deploy that one."""
    with file_lock(registry.root / ".lock"):
        deployed = read_deployment(registry)
        others = [known for known in registry.names() if known != name]
        if deployed is not None and (others or deployed.reference.partition("@")[0] == name):
            return
        if len(others) <= 1:
            reference = others[0] if others else f"{name}@champion"
            _write(registry, Deployment(reference), by="first registration")


def roll_back(registry: Registry, **audit: Any) -> Deployment:
    """Return to the deployment before the current one; a second rollback undoes the first.

    Raises:
        Conflict: there was no other deployment whose model still exists, or its canary or shadow was deleted.
    """
    with file_lock(registry.root / ".lock"):
        present = read_deployment(registry)
        for earlier in reversed(_history(registry)):
            if earlier != present:
                try:
                    registry.lookup(earlier.reference)
                except NotFound:
                    continue
                _check_shares(registry, earlier)
                _write(registry, earlier, **audit)
                return earlier
    raise Conflict("nothing else has been the default before, so there is nothing to go back to")


def _check_shares(registry: Registry, deployment: Deployment) -> None:
    """Raise `Conflict` if the canary or the shadow of an earlier deployment was deleted."""
    for part, share in (("canary", deployment.canary), ("shadow", deployment.shadow)):
        if share is not None:
            try:
                registry.lookup(share.reference)
            except NotFound:
                raise Conflict(
                    f"the deployment of {deployment.reference} before the present one had the {part} {share.reference}, which was"
                    f" deleted. Deploy {deployment.reference} without it, or with another"
                ) from None


def _write(registry: Registry, deployment: Deployment, **audit: Any) -> None:
    write_json(registry.root / _DEFAULT, deployment.to_dict())
    append_line(registry.root / JOURNAL, {"at": time.time(), "deployment": deployment.to_dict(), **audit})


@dataclass(frozen=True)
class Deployed:
    """One deployment in the journal."""

    deployment: Deployment
    at: float  # Unix seconds
    by: str


def deployments(registry: Registry) -> list[Deployed]:
    """Return all deployments in the journal, oldest first."""
    found = []
    for line in read_lines(registry.root / JOURNAL):
        with contextlib.suppress(ValidationError):
            if isinstance(line, dict):
                deployment = _ADAPTER.validate_python(line.get("deployment"))
                found.append(Deployed(deployment, float(line.get("at", 0.0)), str(line.get("by", ""))))
    return found


def _history(registry: Registry) -> list[Deployment]:
    return [one.deployment for one in deployments(registry)]
