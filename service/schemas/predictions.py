"""Documents of predictions: options and results."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from finetune.bundle.calibration import CertaintyOptions
from service.problems import FieldProblem


class PredictOptions(BaseModel):
    """The options of a prediction, as query parameters or form fields (a form field wins)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: int | None = Field(None, ge=1, description="Number of classes to return, or all if there are fewer. Default: 5.")
    explain: bool = Field(False, description="Also return the class activation map of the most probable class.")
    embedding: bool = Field(False, description="Also return the embedding of the image: the input of the last linear layer.")
    coverage: float | None = Field(
        None,
        ge=0.5,
        le=0.99,
        description="Also return a set of labels that contains the true one with this probability, such as 0.9.",
    )
    per_class: bool = Field(False, description="Guarantee the coverage for each class, not only on average; the sets are larger.")
    abstain: bool | None = Field(
        None,
        description="Also return `abstained`: whether the prediction is too uncertain to rely on. Default: the setting of "
        "the model's owner.",
    )
    precision: float | None = Field(
        None,
        ge=0.5,
        le=0.99,
        description="The share of the remaining predictions that must be correct. Default: the setting of the model's "
        "owner, else 0.95.",
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

    label: str = Field(description="The class that the map is for: the most probable one.")
    cam: list[list[float]] | None = Field(
        description="The contributions of h' × w' positions of the preprocessed image to the logit of the class."
    )
    overlay_png_base64: str | None = Field(description="The preprocessed image with the map drawn over it, as PNG.")
    image_jpeg_base64: str | None = Field(description="The preprocessed image without the map, as JPEG.")
    reason: str | None = Field(description="Why there is no map.")


class Timings(BaseModel):
    """The durations of a request, in milliseconds."""

    predict_ms: float = Field(description="Decoding, preprocessing and the model.")
    explain_ms: float
    total_ms: float = Field(description="From the complete body to the response, including the wait for a free core.")


class PredictionSet(BaseModel):
    """A set of labels that contains the true one with a chosen probability."""

    coverage: float = Field(
        description="The coverage of the set: the requested one, rounded up to one that the bundle has thresholds for."
    )
    labels: list[str] = Field(description="Most probable first; never empty.")


class ImagePrediction(BaseModel):
    """The prediction for one image."""

    predictions: list[LabelProbability] = Field(description="Most probable first.")
    explanation: Explanation | None
    labels: list[str] | None = Field(
        None,
        description="Multi-label models only: the predicted labels, the most probable first. A label is predicted if its "
        "probability reaches its threshold.",
    )
    scores: dict[str, float] | None = Field(None, description="With `labels`: the probability of every class, by name.")
    thresholds: dict[str, float] | None = Field(
        None, description="With `labels`: the probability threshold of every class, by name."
    )
    embedding: list[float] | None = None
    prediction_set: PredictionSet | None = Field(None, description="Only if `coverage` was requested.")
    abstained: bool | None = Field(
        None,
        description="Whether the prediction is too uncertain to rely on. Only if this was requested, or switched on by "
        "the model's owner.",
    )
    reason: Literal["unsure", "unlike"] | None = Field(
        None,
        description="Why the model abstained: `unsure`, too uncertain for the precision; `unlike`, an image unlike the "
        "known ones.",
    )
    novelty: float | None = Field(
        None,
        description="Share of the held-out images that are closer to the known images than this one; from 0.95 on, the "
        "image counts as unlike them.",
    )


class PredictionAnswer(ImagePrediction):
    """The prediction for one image, with the model and the timings."""

    model: str
    version: str
    timings: Timings


class ImageFailure(BaseModel):
    """The error of an image without prediction."""

    code: str = Field(description="A stable code for programs.")
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
