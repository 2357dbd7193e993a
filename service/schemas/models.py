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
    refused: str | None = Field(description="Why the server refuses to serve this version.")


class ModelDocument(ListItem):
    """A registered model: the fields of the public API (`id`, `object`, `created`, `owned_by`) and additional ones."""

    object: Literal["model"] = "model"
    created: int = Field(description="When the newest version was registered, Unix seconds.")
    owned_by: str = Field(description="The owner of the job that made the model; `finetune` if no job made it.")
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
    classes: list[str] = Field(description="The classes, in the order of the model's outputs.")
    method: dict[str, Any]
    hyperparameters: dict[str, Any] = Field(description="The resolved values; empty if the run's folder no longer exists.")
    backbone: str
    weights: dict[str, Any] = Field(description="Where the pretrained weights came from: source, identifier, sha256, license.")
    license: str | None
    input_size_px: list[int] = Field(description="Height and width of the input.")
    metrics: dict[str, float | None] = Field(description="By `split/name`.")
    splits: dict[str, Any] = Field(
        description="By split: number of images, metrics with intervals, table by class, confusion matrix."
    )
    calibration: dict[str, Any] = Field(
        description="The temperature and, under `held_out`, the thresholds of prediction sets and abstention."
    )
    abstain_precision: float | None = Field(
        description="The precision with which the owner has switched abstention on; null: off."
    )
    parity: dict[str, Any] = Field(description="The largest differences between the exported and the trained model.")
    explanation: dict[str, Any] = Field(description="Whether the model has a class activation map, and if not, why.")
    versions: dict[str, str] = Field(description="Versions of the libraries that the bundle was made with.")
    bundle_bytes: int
    exports: list[str] = Field(description="Formats of other tools that this server can export the version to.")
    links: dict[str, str | None] = Field(description="Paths on this server: report, bundle, card, job; null if there is none.")


ModelList = Page[ModelDocument]


class ModelChange(RequestBody):
    """The new access rights of a model."""

    visibility: Visibility


class Abstention(RequestBody):
    """The precision at which a version abstains by default."""

    precision: float | None = Field(
        ge=0.5, le=0.99, description="The share of the remaining predictions that must be correct; null: abstention is off."
    )


class ModelDeleted(BaseModel):
    """The confirmation that a model or version was deleted."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class PromotionConditions(RequestBody):
    """Additional conditions of a promotion. A version must always load, have parity, know the same classes, and not be worse
    than the version that it replaces on the test images of both (paired test, p < 0.05)."""

    minimum: dict[str, float] = Field(
        default={}, max_length=32, description="Minimum value of each metric, by key such as `test/top1`."
    )
    force: bool = Field(
        default=False, description="Promote even if a condition fails. A version that cannot be loaded is always refused."
    )


class AliasTarget(PromotionConditions):
    """The version for an alias, with conditions of the promotion."""

    version: str = Field(min_length=1, max_length=63, description="The number of a version, or one of its aliases.")


class ShareDocument(RequestBody):
    """A model and its share of the requests, in percent."""

    reference: Annotated[str, Field(min_length=1, max_length=127, description="name, name@version or name@alias")]
    percent: Annotated[float, Field(ge=0.0, le=100.0)]


class DeploymentChange(PromotionConditions):
    """The new deployment for requests without a model name. A canary or shadow that is not given is switched off."""

    reference: Annotated[str, Field(min_length=1, max_length=127, description="name, name@version or name@alias")]
    canary: ShareDocument | None = Field(
        default=None, description="The model that answers this share of the requests instead of the default."
    )
    shadow: ShareDocument | None = Field(
        default=None, description="The model that also predicts for this share of the requests; disagreements are logged."
    )


class DeploymentDocument(BaseModel):
    """The deployment for requests without a model name. The names are null if there is no default that the caller may see."""

    object: Literal["deployment"] = "deployment"
    reference: str | None
    model: str | None
    version: str | None
    pinned: bool = Field(
        description="Whether the model was chosen when the server was started (--model), so that promotions do not change it."
    )
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
