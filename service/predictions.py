"""One prediction over HTTP: a request's body to image bytes and options, and a predictor's result to the answer.

An image comes as the multipart field ``image`` or as the raw body. Nothing is ever fetched: text where a file should be is an
error, also when it looks like a URL. Knows HTTP bodies and predictors; does not know routes.
"""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from finetune.bundle.image import ImageLimits
from finetune.bundle.overlay import overlay_png
from finetune.bundle.predictor import Prediction
from finetune.errors import InvalidInput, Problem
from service.models import LoadedModel
from service.schemas.predictions import Explanation, LabelProbability, PredictionAnswer, PredictOptions, Timings

DEFAULT_TOP_K = 5
IMAGE_FIELD = "image"
# What `curl --data-binary @cat.jpg` sends by itself, without a header: the body is an image all the same.
CURL_DEFAULT_TYPE = "application/x-www-form-urlencoded"
HOW_TO_SEND = (
    "Send the image as multipart field 'image' (curl -F image=@cat.jpg) or as the raw body (curl --data-binary @cat.jpg)"
)


@dataclass(frozen=True)
class Upload:
    image: bytes
    options: PredictOptions
    received: float  # perf_counter seconds


class _InMemoryParser(MultiPartParser):
    """Keeps the file in memory: it is needed there as a whole, and the body limit has bounded it already."""

    spool_max_size = ImageLimits().max_bytes


async def read_upload(request: Request, options: PredictOptions) -> Upload:
    """The image and the options of a predict request.

    Raises:
        HTTPException: 415 for a body that cannot hold an image, 400 for broken multipart.
        InvalidInput: no image, several, or text in its place.
        RequestValidationError: an option that is unknown or out of range.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        form = await _read_form(request)
        try:
            image = await _image_of(form)
            options = _merged(options, form)
        finally:
            await form.close()
    elif media_type.startswith("image/") or media_type in ("", "application/octet-stream", CURL_DEFAULT_TYPE):
        image = await request.body()
    else:
        raise HTTPException(415, f"A body of type {media_type!r} is not an image. {HOW_TO_SEND}")
    if not image:
        raise InvalidInput(
            f"There is no image: the {'file' if media_type == 'multipart/form-data' else 'body'} is empty. {HOW_TO_SEND}"
        )
    return Upload(image, options, time.perf_counter())


async def _read_form(request: Request) -> FormData:
    try:
        return await _InMemoryParser(request.headers, request.stream(), max_files=1, max_fields=8, max_part_size=1024).parse()
    except MultiPartException as error:
        raise HTTPException(400, f"The multipart body cannot be read: {error.message}") from None


async def _image_of(form: FormData) -> bytes:
    twice = sorted({name for name in form if len(form.getlist(name)) > 1})
    if twice:
        raise InvalidInput(
            f"Given more than once: {', '.join(twice)}", [Problem(name, "is given more than once") for name in twice]
        )
    given = form.get(IMAGE_FIELD)
    if given is None:
        sent = ", ".join(form) or "nothing"
        raise InvalidInput(
            f"There is no field 'image' (given: {sent[:100]}). {HOW_TO_SEND}", [Problem(IMAGE_FIELD, "is missing")]
        )
    if not isinstance(given, UploadFile):
        message = "must be an uploaded file, not text. The server fetches nothing: download the image and send its bytes"
        raise InvalidInput(f"The field 'image' {message}", [Problem(IMAGE_FIELD, message)])
    return await given.read()


def _merged(query: PredictOptions, form: FormData) -> PredictOptions:
    """The query's options with the form's over them. ``null`` is how BentoML's client writes an option that is not given."""
    fields: dict[str, Any] = {name: value for name, value in form.multi_items() if name != IMAGE_FIELD and value != "null"}
    try:
        return PredictOptions.model_validate(query.model_dump(exclude_unset=True) | fields)
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None


def predict(model: LoadedModel, upload: Upload, limits: ImageLimits) -> PredictionAnswer:
    """Classify one image with one model.

    Raises:
        ImageError: the image cannot be decoded, is too large, or is of no known format.
        InvalidInput: `top_k` is more than the model has classes.
    """
    started = time.perf_counter()
    n_classes = len(model.predictor.manifest.classes)
    top_k = upload.options.top_k
    if top_k is not None and top_k > n_classes:
        message = f"must be at most {n_classes}, the number of classes of {model.name}@{model.version} (given: {top_k})"
        raise InvalidInput(f"top_k {message}", [Problem("top_k", message)])
    prediction = model.predictor.predict(upload.image, top_k=top_k or DEFAULT_TOP_K, limits=limits)
    predicted = time.perf_counter()
    explanation = _explanation(model, prediction) if upload.options.explain else None
    done = time.perf_counter()
    return PredictionAnswer(
        model=model.name,
        version=model.version,
        predictions=[LabelProbability(label=label, probability=probability) for label, probability in prediction.labels],
        explanation=explanation,
        timings=Timings(
            predict_ms=_ms(predicted - started),
            explain_ms=_ms(done - predicted),
            total_ms=_ms(done - upload.received),
        ),
    )


def _explanation(model: LoadedModel, prediction: Prediction) -> Explanation:
    label = prediction.labels[0][0]
    if prediction.cam is None:
        reason = model.predictor.manifest.cam.get("reason") or "this bundle has no class activation map"
        return Explanation(label=label, cam=None, overlay_png_base64=None, reason=reason)
    png = overlay_png(prediction.image, prediction.cam)
    return Explanation(
        label=label, cam=prediction.cam.tolist(), overlay_png_base64=base64.b64encode(png).decode("ascii"), reason=None
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
