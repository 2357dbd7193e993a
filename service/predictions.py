"""Parse the body of a predict request into images and options, and convert a predictor's result into the response.

An image is sent as the multipart field ``image`` or as the raw body, several images as the repeated field ``images``. The server
never downloads anything: text instead of a file is an error, even if it is a URL.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from finetune.bundle.calibration import Certainty
from finetune.bundle.image_limits import ImageLimits
from finetune.bundle.overlay import image_jpeg, overlay_png
from finetune.bundle.predictor import Prediction
from finetune.errors import FinetuneError, ImageError, InvalidInput, Problem
from finetune.monitoring.statistics import PredictionStatistics, statistics_of
from service.forms import Part, read_form
from service.models import LoadedModel
from service.problems import FieldProblem
from service.schemas.predictions import (
    Explanation,
    ImageFailure,
    ImagePrediction,
    ImageResult,
    LabelProbability,
    PredictionAnswer,
    PredictionSet,
    PredictOptions,
    Timings,
)

DEFAULT_TOP_K = 5
IMAGE_FIELD = "image"
IMAGES_FIELD = "images"
MAX_IMAGES = 64
# The content type of `curl --data-binary @cat.jpg` by default; the body is an image nevertheless.
CURL_DEFAULT_TYPE = "application/x-www-form-urlencoded"
HOW_TO_SEND = (
    "Send the image as multipart field 'image' (curl -F image=@cat.jpg) or as the raw body (curl --data-binary @cat.jpg)"
)


@dataclass(frozen=True)
class Stages:
    """The durations of the stages of one prediction, and its statistics."""

    decode_seconds: float
    preprocess_seconds: float
    run_seconds: float  # ONNX Runtime
    ended: float  # Unix seconds
    probs: np.ndarray  # (C,) float32
    statistics: PredictionStatistics  # for drift monitoring

    @property
    def seconds(self) -> dict[str, float]:
        """The durations by stage, as the metrics name them."""
        return {"decode": self.decode_seconds, "preprocess": self.preprocess_seconds, "run": self.run_seconds}


@dataclass(frozen=True)
class Upload:
    """The images and options of one request. `several`: they were sent as a list, so the response is a list."""

    images: tuple[tuple[str | None, bytes], ...]  # (file name, contents)
    options: PredictOptions
    received: float  # perf_counter seconds
    several: bool = False
    stages: dict[int, Stages] = field(default_factory=dict)  # by image; for metrics, tracing and monitoring


async def read_upload(request: Request) -> Upload:
    """Return the images and the options of a predict request.

    Raises:
        HTTPException: 415 for a content type that is not an image or form, 400 for invalid multipart.
        InvalidInput: there is no image or there are too many, or text instead of an image.
        RequestValidationError: an option is unknown or out of range.
    """
    query = dict(request.query_params)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        upload = _of_form(await read_form(request), query)
    elif media_type.startswith("image/") or media_type in ("", "application/octet-stream", CURL_DEFAULT_TYPE):
        options = _options(query, {})
        upload = Upload(((None, await request.body()),), options, time.perf_counter())
    else:
        raise HTTPException(415, f"A body of type {media_type[:100]!r} is not an image. {HOW_TO_SEND}")
    if not upload.several and not upload.images[0][1]:
        what = "file" if media_type == "multipart/form-data" else "body"
        raise InvalidInput(f"There is no image: the {what} is empty. {HOW_TO_SEND}")
    return upload


def _of_form(form: Sequence[Part], query: dict[str, str]) -> Upload:
    several = any(part.name == IMAGES_FIELD for part in form)
    _refuse_repetitions(form, several)
    files = [part for part in form if part.name in (IMAGE_FIELD, IMAGES_FIELD)]
    if not files:
        sent = ", ".join(part.name for part in form) or "nothing"
        raise InvalidInput(
            f"There is no field 'image' (given: {sent[:100]}). {HOW_TO_SEND}", [Problem(IMAGE_FIELD, "is missing")]
        )
    if len(files) > MAX_IMAGES:
        raise InvalidInput(
            f"{len(files)} images in one request; {MAX_IMAGES} are allowed", [Problem(IMAGES_FIELD, "has too many images")]
        )
    for part in files:
        if not part.is_file:
            message = "must be an uploaded file, not text. The server fetches nothing: download the image and send its bytes"
            raise InvalidInput(f"The field '{part.name}' {message}", [Problem(part.name, message)])
    fields = {part.name: part.text for part in form if part.name not in (IMAGE_FIELD, IMAGES_FIELD)}
    # BentoML's client sends ``null`` for an option that is not given
    options = _options(query, {name: value for name, value in fields.items() if value != "null"})
    return Upload(tuple((part.filename, part.content) for part in files), options, time.perf_counter(), several)


def _refuse_repetitions(form: Sequence[Part], several: bool) -> None:
    names = [part.name for part in form]
    if several and IMAGE_FIELD in names:
        raise InvalidInput("Give either image or images", [Problem(IMAGE_FIELD, "is given beside images")])
    twice = sorted({name for name in names if names.count(name) > 1 and name != IMAGES_FIELD})
    if twice:
        hint = ". Several images are sent as the repeated field 'images'" if IMAGE_FIELD in twice else ""
        raise InvalidInput(
            f"Given more than once: {', '.join(twice)}{hint}", [Problem(name, "is given more than once") for name in twice]
        )


def _options(query: dict[str, str], fields: dict[str, Any]) -> PredictOptions:
    """Return the options of query and form; those of the form win, but options in both must be valid in both."""
    if query.keys() & fields.keys():
        _validated(query, {})
    return _validated(query, fields)


def _validated(query: dict[str, str], fields: dict[str, Any]) -> PredictOptions:
    try:
        return PredictOptions.model_validate({**query, **fields})
    except ValidationError as error:
        places = [("body" if one["loc"] and one["loc"][0] in fields else "query", one) for one in error.errors()]
        raise RequestValidationError([{**one, "loc": (place, *one["loc"])} for place, one in places]) from None


def predict(model: LoadedModel, upload: Upload, limits: ImageLimits) -> PredictionAnswer:
    """Classify the first image of an upload. Raises `ImageError` if it cannot be read."""
    started = time.perf_counter()
    found, explain_seconds, upload.stages[0] = predict_image(model, upload.images[0][1], upload.options, limits)
    done = time.perf_counter()
    return PredictionAnswer(
        model=model.name,
        version=model.version,
        predictions=found.predictions,
        explanation=found.explanation,
        labels=found.labels,
        scores=found.scores,
        thresholds=found.thresholds,
        embedding=found.embedding,
        prediction_set=found.prediction_set,
        abstained=found.abstained,
        reason=found.reason,
        novelty=found.novelty,
        timings=Timings(
            predict_ms=_ms(done - started - explain_seconds),
            explain_ms=_ms(explain_seconds),
            total_ms=_ms(done - upload.received),
        ),
    )


def predict_one_of_several(
    model: LoadedModel, upload: Upload, index: int, limits: ImageLimits
) -> tuple[ImageResult, float, float]:
    """Classify one image of an upload; return its result or error, and the seconds for prediction and explanation."""
    filename, data = upload.images[index]
    started = time.perf_counter()
    try:
        found, explain_seconds, upload.stages[index] = predict_image(model, data, upload.options, limits)
    except FinetuneError as error:
        problems = [FieldProblem(field=one.where, detail=one.message) for one in error.problems]
        failure = ImageFailure(code=error.code, message=error.message, errors=problems)
        return ImageResult(index=index, filename=filename, result=None, error=failure), time.perf_counter() - started, 0.0
    seconds = time.perf_counter() - started
    return ImageResult(index=index, filename=filename, result=found, error=None), seconds - explain_seconds, explain_seconds


def predict_image(
    model: LoadedModel, data: bytes, options: PredictOptions, limits: ImageLimits
) -> tuple[ImagePrediction, float, Stages]:
    """Classify one image; return the result, the seconds for the explanation, and the durations of the stages.

    Raises:
        ImageError: the image is empty, too large, cannot be decoded, or has an unknown format.
    """
    if not data:
        raise ImageError("the image is empty (0 bytes). Check that the upload or the copy finished")
    prediction = model.predictor.predict(data, top_k=options.top_k or DEFAULT_TOP_K, limits=limits, options=options.certainty)
    predicted = time.perf_counter()
    statistics = statistics_of_model(model, prediction.probs[None], prediction.embedding[None])
    stages = Stages(
        prediction.decode_seconds,
        prediction.preprocess_seconds,
        prediction.run_seconds,
        time.time(),
        prediction.probs,
        statistics,
    )
    explanation = _explanation(model, prediction) if options.explain else None
    seconds = time.perf_counter() - predicted
    found = ImagePrediction.model_construct(
        predictions=[
            LabelProbability.model_construct(label=label, probability=probability) for label, probability in prediction.labels
        ],
        explanation=explanation,
        **(prediction.several.to_dict() if prediction.several else {}),
        embedding=prediction.embedding.tolist() if options.embedding else None,
        prediction_set=_prediction_set(prediction.certainty),
        abstained=prediction.certainty.abstained,
        reason=prediction.certainty.reason,
        novelty=prediction.certainty.novelty,
    )
    return found, seconds, stages


def statistics_of_model(model: LoadedModel, probs: np.ndarray, embeddings: np.ndarray) -> PredictionStatistics:
    """Return the statistics of N predictions for drift monitoring, from probabilities (N, C) and embeddings (N, D)."""
    manifest = model.predictor.manifest
    return statistics_of(manifest.task, probs, embeddings, model.predictor.estimator.subspace, manifest.thresholds)


def sample_record(model: LoadedModel, owner: str, probs: np.ndarray, statistics: PredictionStatistics) -> dict[str, Any]:
    """Return the record for a sampled image: the caller, and the model's prediction from its probabilities (C,).

    Args:
        statistics: of this prediction only.
    """
    predictor = model.predictor
    order, several = predictor.task.ranking(probs)[:DEFAULT_TOP_K], predictor.several_labels(probs)
    calibration, distance = predictor.estimator.calibration, float(statistics.distance[0])
    known = calibration is not None and calibration.novelty and math.isfinite(distance)
    return {
        "owner": owner,
        "confidence": float(statistics.confidence[0]),
        "novelty": calibration.novelty_of(distance) if calibration is not None and known else None,
        "predictions": [{"label": predictor.manifest.classes[label], "probability": float(probs[label])} for label in order],
        **({} if several is None else {"labels": list(several.given)}),
    }


def unasked_fields(model: LoadedModel, options: PredictOptions) -> set[str]:
    """Return the fields to leave out of a response, because they were not requested or the model does not have them.

    Raises:
        InvalidInput: the bundle has no calibration for the requested coverage or precision.
    """
    asked = model.predictor.estimator.resolved(options.certainty)
    parts = {
        **dict.fromkeys(("labels", "scores", "thresholds"), model.predictor.manifest.label_thresholds is not None),
        "embedding": options.embedding,
        "prediction_set": asked.coverage is not None,
        **dict.fromkeys(("abstained", "reason", "novelty"), asked.abstain),
    }
    return {part for part, wanted in parts.items() if not wanted}


def _prediction_set(certainty: Certainty) -> PredictionSet | None:
    if certainty.labels is None or certainty.coverage is None:
        return None
    return PredictionSet(coverage=certainty.coverage, labels=list(certainty.labels))


def _explanation(model: LoadedModel, prediction: Prediction) -> Explanation:
    label = prediction.labels[0][0]
    if prediction.cam is None:
        reason = model.predictor.manifest.cam.get("reason") or "this bundle has no class activation map"
        return Explanation(label=label, cam=None, overlay_png_base64=None, image_jpeg_base64=None, reason=reason)
    png = overlay_png(prediction.image, prediction.cam)
    return Explanation(
        label=label,
        cam=prediction.cam.tolist(),
        overlay_png_base64=base64.b64encode(png).decode("ascii"),
        image_jpeg_base64=base64.b64encode(image_jpeg(prediction.image)).decode("ascii"),
        reason=None,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def timings(predict_seconds: float, explain_seconds: float, received: float) -> Timings:
    """Return the timings of a response that is completed now."""
    return Timings(predict_ms=_ms(predict_seconds), explain_ms=_ms(explain_seconds), total_ms=_ms(time.perf_counter() - received))
