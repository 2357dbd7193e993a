"""Documents of predictions: what may be asked, and the answer."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class PredictOptions(BaseModel):
    """What may be asked besides the image, in the query or as form fields (a form field wins)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: int | None = Field(
        None, ge=1, description="How many classes to answer, at most as many as there are. Default: 5, or all if fewer."
    )
    explain: bool = Field(False, description="Also answer where the model looked: the class activation map of the top class.")


class LabelProbability(BaseModel):
    label: str
    probability: float


class Explanation(BaseModel):
    """Where the model looked. Both are null, with a reason, for a model whose head does not allow an exact map."""

    label: str = Field(description="The class that is explained: the most probable one.")
    cam: list[list[float]] | None = Field(description="h' × w' contributions to the class's logit, over the preprocessed image.")
    overlay_png_base64: str | None = Field(description="The preprocessed image with the map drawn over it, as PNG.")
    reason: str | None = Field(description="Why there is no map.")


class Timings(BaseModel):
    predict_ms: float = Field(description="Decoding, preprocessing and the model.")
    explain_ms: float
    total_ms: float = Field(description="From the complete body to the answer, waiting for a free core included.")


class PredictionAnswer(BaseModel):
    model: str
    version: str
    predictions: list[LabelProbability] = Field(description="Most probable first.")
    explanation: Explanation | None
    timings: Timings
