"""Documents of training plans: the request, the trained stages, and estimated durations."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from finetune.runs.forecast import Forecast
from service.schemas.body import RequestBody

MAX_METHODS = 16


class PlanRequest(RequestBody):
    """The request for a plan: methods, and facts about data that need not be uploaded yet."""

    methods: list[str | dict[str, Any]] = Field(
        min_length=1, max_length=MAX_METHODS, description="As in a job spec: `linear_probe`, `{type: partial, stages: 2}` …"
    )
    images: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Number of images; without it, no durations are estimated."
    )
    classes: int = Field(default=2, ge=1, le=100_000)
    bytes: int | None = Field(
        default=None, ge=1, le=1 << 50, description="Total size of all image files; by default that of typical photographs."
    )
    model: str | dict[str, Any] | None = Field(default=None, description="As for a job.")
    data: dict[str, Any] | None = Field(default=None, description="As for a job.")
    hyperparameters: dict[str, Any] | None = Field(default=None, description="As for a job.")
    compute: dict[str, Any] | None = Field(default=None, description="As for a job.")


class PlanStage(BaseModel):
    """A stage of the backbone; the first is the stem, and the head comes after the last."""

    index: int
    name: str
    parameters: int


class PlanSeconds(BaseModel):
    """The estimated duration of a job, if nothing else runs on this machine and no job is queued before it."""

    low: float
    about: float
    high: float

    @classmethod
    def of(cls, forecast: Forecast) -> PlanSeconds:
        return cls(low=round(forecast.low, 1), about=round(forecast.about, 1), high=round(forecast.high, 1))


class PlannedMethod(BaseModel):
    """The plan of one method."""

    method: dict[str, Any] = Field(description="The method, with all its fields.")
    trains: list[int] = Field(description="Indices of the stages that train, besides the head.")
    may_train: list[int] = Field(description="Indices of the stages that train only if that improves the model.")
    seconds: PlanSeconds | None


class PlanDocument(BaseModel):
    """What each method would train of a backbone, with estimated durations on this machine."""

    object: Literal["training_plan"] = "training_plan"
    backbone: str
    parameters: int
    input_size_px: list[int]
    stages: list[PlanStage]
    methods: list[PlannedMethod] = Field(description="The plans, in the order of the request.")
