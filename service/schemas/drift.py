"""The document of drift: predictions in production compared with those for held-out images."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from finetune.monitoring.drift import DriftState, EffectMeasure
from service.schemas.body import RequestBody


class DriftTestDocument(BaseModel):
    """One test of predictions in production against the reference."""

    name: str = Field(
        description="`confidence`, `classes` or `embedding`; for a multi-label model also `labels` or `labels_per_image`."
    )
    what: str = Field(description="What is compared.")
    test: str
    statistic: float
    p: float
    adjusted_p: float = Field(description="The p-value after adjustment for the number of tests (Holm).")
    effect: float
    effect_measure: EffectMeasure
    threshold: float = Field(
        description="The least relevant effect size: smaller effects do not count, however significant they are."
    )
    drifted: bool = Field(description="The adjusted p is at most `alpha`, and the effect reaches its threshold.")


class DriftReference(BaseModel):
    """The images of the reference."""

    split: str = Field(description="Of the data set; `accepted`: images in production that were accepted as the reference.")
    n: int


class ReferenceChoice(RequestBody):
    """Which images later ones are compared with."""

    use: Literal["live", "bundle"] = Field(
        description="`live`: the last images in production; `bundle`: the held-out images of the bundle."
    )


class DriftHour(BaseModel):
    """Statistics of the predictions of one hour."""

    at: int = Field(description="When it began, Unix seconds.")
    n: int
    mean_confidence: float
    unlike_share: float | None = Field(
        description="Share of images that are farther from the known images than 95 % of the held-out images; null if unknown."
    )


class DriftDocument(BaseModel):
    """Whether a version's predictions in production differ from its predictions for held-out images."""

    object: Literal["model.drift"] = "model.drift"
    model: str
    version: str
    state: DriftState = Field(
        description="`no_reference` for bundles of earlier versions; `collecting` below `n_needed` live images."
    )
    sentence: str = Field(description="The state as a sentence.")
    n: int = Field(description="Number of compared images in production: the last ones, at most `window`.")
    n_needed: int
    n_seen: int = Field(description="Number of all images in production.")
    window: int
    reference: DriftReference | None
    alpha: float = Field(description="The largest probability of a false alarm in one window.")
    drifted_since: int | None = Field(
        description="When the server first found drift, Unix seconds; null while it has found none. It tests every 100 images."
    )
    tests: list[DriftTestDocument] = Field(description="Empty below `n_needed`.")
    hours: list[DriftHour] = Field(description="The last 48 hours with predictions, oldest first.")
