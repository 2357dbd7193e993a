"""Documents of predictions: options and results."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from finetune.bundle.calibration import CertaintyOptions
from service.problems import FieldProblem


class PredictOptions(BaseModel):
    """The options of a prediction, as query parameters or form fields (a form field wins)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: int | None = Field(None, ge=1, description="How many classes to answer; all where there are fewer. Default: 5.")
    explain: bool = Field(False, description="Also answer where the model looked: the class activation map of the top class.")
    embedding: bool = Field(False, description="Also answer the image's embedding: what the last linear layer sees.")
    coverage: float | None = Field(
        None,
        ge=0.5,
        le=0.99,
        description="Also answer a set of labels that holds the right one with this probability, as in 0.9.",
    )
    per_class: bool = Field(False, description="The coverage holds for each class by itself, not only on average: larger sets.")
    abstain: bool | None = Field(
        None,
        description="Also answer whether to rely on the answer: `abstained`. Default: what the model's owner has switched on.",
    )
    precision: float | None = Field(
        None,
        ge=0.5,
        le=0.99,
        description="Abstain, so that this share of the answers given is right. Default: the owner's choice, else 0.95.",
    )

    @property
    def certainty(self) -> CertaintyOptions:
        """The requested prediction set and abstention."""
        return CertaintyOptions(self.coverage, self.per_class, self.abstain, self.precision)


class LabelProbability(BaseModel):
    """A class and its probability."""

    label: str
    probability: float


class Explanation(BaseModel):
    """The class activation map. Map and images are null, with a reason, for a model whose head does not allow an exact map."""

    label: str = Field(description="The class that is explained: the most probable one.")
    cam: list[list[float]] | None = Field(description="h' × w' contributions to the class's logit, over the preprocessed image.")
    overlay_png_base64: str | None = Field(description="The preprocessed image with the map drawn over it, as PNG.")
    image_jpeg_base64: str | None = Field(description="The preprocessed image alone: what the model saw, as JPEG.")
    reason: str | None = Field(description="Why there is no map.")


class Timings(BaseModel):
    """The durations of a request, in milliseconds."""

    predict_ms: float = Field(description="Decoding, preprocessing and the model.")
    explain_ms: float
    total_ms: float = Field(description="From the complete body to the answer, waiting for a free core included.")


class PredictionSet(BaseModel):
    """A set of labels that contains the true one with a chosen probability."""

    coverage: float = Field(description="That the set has: what was asked, rounded up to what the bundle knows.")
    labels: list[str] = Field(description="Most probable first; never empty.")


class ImagePrediction(BaseModel):
    """The prediction for one image."""

    predictions: list[LabelProbability] = Field(description="Most probable first.")
    explanation: Explanation | None
    labels: list[str] | None = Field(
        None,
        description="Only of models for which an image may have several labels, or none: those that it is given, the most "
        "probable first. A label is given where its probability reaches its threshold.",
    )
    scores: dict[str, float] | None = Field(None, description="With `labels`: the probability of every class, by name.")
    thresholds: dict[str, float] | None = Field(
        None, description="With `labels`: the probability from which on each class is given, by name."
    )
    embedding: list[float] | None = None
    prediction_set: PredictionSet | None = Field(None, description="Only where a `coverage` was asked for.")
    abstained: bool | None = Field(
        None,
        description="Do not rely on this answer. Only where that was asked for, or where the model's owner has switched it on.",
    )
    reason: Literal["unsure", "unlike"] | None = Field(
        None, description="Why it abstained: not sure enough for the precision, or an image unlike anything seen."
    )
    novelty: float | None = Field(
        None, description="Share of held-out images that are less unlike the known ones; from 0.95 on it is unlike anything seen."
    )


class PredictionAnswer(ImagePrediction):
    """The prediction for one image, with the model and the timings."""

    model: str
    version: str
    timings: Timings


class ImageFailure(BaseModel):
    """The error of an image without prediction."""

    code: str = Field(description="Stable: branch on this.")
    message: str
    errors: list[FieldProblem] = []


class ImageResult(BaseModel):
    """The prediction or the error of one image in a request with several."""

    index: int = Field(description="Its position among the images of the request, from 0.")
    filename: str | None
    result: ImagePrediction | None
    error: ImageFailure | None


class PredictionList(BaseModel):
    """The predictions for several images, in order. An unreadable image has an error and does not affect the others."""

    object: Literal["list"] = "list"
    model: str
    version: str
    data: list[ImageResult]
    n_failed: int
    timings: Timings
