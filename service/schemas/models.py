"""Documents of registered models and of the default deployment."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from service.schemas.body import RequestBody
from service.schemas.lists import ListItem, Page

Visibility = Literal["private", "shared"]


class VersionSummary(BaseModel):
    """One version of a model in a list."""

    version: str
    created: int = Field(description="Unix seconds.")
    aliases: list[str]
    live: bool = Field(description="In memory now.")
    refused: str | None = Field(description="Why the server does not serve this version although it was asked to.")


class ModelDocument(ListItem):
    """A registered model: the fields of the public API (`id`, `object`, `created`, `owned_by`) and additional ones."""

    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds, of the newest version.")
    owned_by: str = Field(description="The owner of the job that made it; `finetune` where no job did.")
    visibility: Visibility = Field(
        description="`shared`: everyone with a key may use it. `private`: its owner and administrators."
    )
    versions: list[VersionSummary] = Field(description="Newest first.")


class VersionDocument(BaseModel):
    """One version of a model: classes, method, metrics, calibration and links."""

    object: Literal["model.version"] = "model.version"
    id: str = Field(description="`name@version`.")
    model: str
    version: str
    created: int = Field(description="Unix seconds.")
    aliases: list[str]
    owned_by: str
    visibility: Visibility
    classes: list[str] = Field(description="In the order of the model's outputs.")
    method: dict[str, Any]
    hyperparameters: dict[str, Any] = Field(description="As resolved; empty where the run's folder is gone.")
    backbone: str
    weights: dict[str, Any] = Field(description="Where the pretrained weights came from: source, identifier, sha256, license.")
    license: str | None
    input_size_px: list[int] = Field(description="Height and width that the model takes.")
    metrics: dict[str, float | None] = Field(description="By `split/name`.")
    splits: dict[str, Any] = Field(description="By split: n, figures with intervals, per class, confusion.")
    calibration: dict[str, Any] = Field(description="Temperature; under `held_out`, how far answers may be relied on.")
    abstain_precision: float | None = Field(description="At which precision the owner has switched abstention on; null: off.")
    parity: dict[str, Any] = Field(description="How exactly the exported model answers as the trained one.")
    explanation: dict[str, Any] = Field(description="Whether there is an activation map, and if not, why.")
    versions: dict[str, str] = Field(description="Of the libraries that made it.")
    bundle_bytes: int
    exports: list[str] = Field(description="Formats of other tools in which this server can write the version.")
    links: dict[str, str | None] = Field(description="Paths on this server: report, bundle, card, job. Null where there is none.")


ModelList = Page[ModelDocument]


class ModelChange(RequestBody):
    """The new access rights of a model."""

    visibility: Visibility


class Abstention(RequestBody):
    """The precision at which a version abstains by default."""

    precision: float | None = Field(ge=0.5, le=0.99, description="The share of its answers that shall be right; null: never.")


class ModelDeleted(BaseModel):
    """The confirmation that a model or version was deleted."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class PromotionConditions(RequestBody):
    """Additional conditions of a promotion. A version must always load, have parity, know the same classes, and not be worse
    than the version that it replaces on the test images of both (paired test, p < 0.05)."""

    minimum: dict[str, float] = Field(default={}, max_length=32, description="The least value of each metric, as in `test/top1`.")
    force: bool = Field(default=False, description="Promote although a condition fails. What cannot be loaded is refused anyway.")


class AliasTarget(PromotionConditions):
    """The version for an alias, with conditions of the promotion."""

    version: str = Field(min_length=1, max_length=63, description="A version's number, or an alias that means it.")


class ShareDocument(RequestBody):
    """A model and its share of the requests, in percent."""

    reference: Annotated[str, Field(min_length=1, max_length=127, description="name, name@version or name@alias")]
    percent: Annotated[float, Field(ge=0.0, le=100.0)]


class DeploymentChange(PromotionConditions):
    """The new deployment for requests without a model name. A canary or shadow that is not given is switched off."""

    reference: Annotated[str, Field(min_length=1, max_length=127, description="name, name@version or name@alias")]
    canary: ShareDocument | None = Field(default=None, description="Answers this share of the requests instead.")
    shadow: ShareDocument | None = Field(default=None, description="Computes this share of the answers a second time; logged.")


class DeploymentDocument(BaseModel):
    """The deployment for requests without a model name. The names are null if there is no default that the caller may see."""

    object: Literal["deployment"] = "deployment"
    reference: str | None
    model: str | None
    version: str | None
    pinned: bool = Field(description="Chosen when the server was started (--model), so promotions do not change it.")
    canary: ShareDocument | None
    shadow: ShareDocument | None


class PastDeployment(BaseModel):
    """One change of the default deployment."""

    object: Literal["deployment.change"] = "deployment.change"
    reference: str
    at: int = Field(description="Unix seconds.")
    by: str = Field(description="The owner of the key that changed it.")


class DeploymentHistory(BaseModel):
    """All changes, newest first; the first entry is the present deployment."""

    object: Literal["list"] = "list"
    data: list[PastDeployment]
