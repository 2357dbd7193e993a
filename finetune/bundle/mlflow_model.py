"""A bundle as MLflow's ``python_function``, for ``mlflow.pyfunc.load_model`` and ``mlflow models serve``. Torch-free.

It uses the same decoder, preprocessing and model as everything else, so its predictions are those of ``/predict``. MLflow loads a
bundle by calling `_load_pyfunc`; this module does not import MLflow.
"""

from __future__ import annotations

import base64
import binascii
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.calibration import CertaintyOptions
from finetune.bundle.manifest import Manifest
from finetune.bundle.predictor import Predictor
from finetune.errors import InvalidInput
from finetune.runtime.cores import available_cores

DEFAULT_TOP_K = 5
BATCH_SIZE = 16
IMAGE_COLUMN = "image"
ACCEPTED_INPUTS = (
    "the bytes of an image file, these in base64, a path, or RGB pixels as uint8 (height, width, 3); one of them, a list, "
    f"a NumPy array (images, height, width, 3), or a table with a column {IMAGE_COLUMN!r}"
)
ASKED = ("coverage", "per_class", "abstain", "precision")
CERTAINTY = ("prediction_set", "abstained", "reason", "novelty")  # columns that exist only if they are asked for
SCORING_SERVER = "mlflow.pyfunc.scoring_server.app"
_PATH_CHARACTERS = 4096


def _load_pyfunc(path: str) -> BundleModel:
    """Load the bundle in the folder `path`. MLflow calls this function by its name."""
    serves = SCORING_SERVER in sys.modules
    # Clients of a server must not be able to make it open files of its machine.
    return BundleModel(Predictor.load(Path(path), threads=1 if serves else available_cores()), may_open_files=not serves)


class BundleModel:
    """A bundle with the interface of an MLflow model.

    Args:
        may_open_files: whether a string may be the path of a file.
    """

    def __init__(self, predictor: Predictor, *, may_open_files: bool = True) -> None:
        self._predictor = predictor
        self._may_open_files = may_open_files

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Classify images; return a pandas table with a row for each image.

        Its columns are ``label`` and ``probability`` of the most probable class, and ``predictions``, the most probable classes
        with their probabilities, as in ``/predict``. A multilabel model adds ``labels``, the predicted labels. If ``coverage`` is
        given, ``prediction_set`` is added; if ``abstain`` is given, or the model's owner has switched abstention on,
        ``abstained``, ``reason`` and ``novelty`` are added.

        Args:
            model_input: see `ACCEPTED_INPUTS`.
            params: ``top_k``: the number of classes to return, at most all; 5 by default. ``coverage``, ``per_class``,
                ``abstain`` and ``precision`` as for ``/predict``.

        Raises:
            InvalidInput: an input is not an image in one of these forms, or the bundle's held-out images are too few for the
                requested coverage or precision.
            ImageError: an image cannot be decoded.
        """
        import pandas as pd  # MLflow requires it; nothing else in this package does

        manifest = self._predictor.manifest
        top_k = _top_k(params, len(manifest.classes))
        asked = self._predictor.estimator.resolved(_options(params))
        rows: list[dict[str, Any]] = []
        for images in _batches(_each_image(model_input), BATCH_SIZE):
            outputs = self._predictor.run(np.stack([self._pixels(image) for image in images]))
            for probs, embedding in zip(outputs.probs, outputs.embedding, strict=True):
                certainty = self._predictor.estimator.estimate(probs, embedding, asked)
                rows.append({**_row(probs, self._predictor, top_k), **certainty.to_dict()})
        certainty_columns = [name for name in CERTAINTY if rows and name in rows[0]]
        return pd.DataFrame(rows, columns=[*columns_of(manifest), *certainty_columns])

    def _pixels(self, image: Any) -> NDArray[np.uint8]:
        """Return the input (h, w, 3) uint8 of the model for one image in any of the forms in `ACCEPTED_INPUTS`."""
        preprocess = self._predictor.manifest.preprocess
        if isinstance(image, bytes | bytearray | memoryview):
            return preprocess.load(bytes(image))
        if isinstance(image, str):
            path = self._path(image)
            return preprocess.load(_decoded(image)) if path is None else preprocess.load_file(path)
        if isinstance(image, os.PathLike) and self._may_open_files:
            return preprocess.load_file(Path(image))
        if isinstance(image, Mapping) and IMAGE_COLUMN in image:
            return self._pixels(image[IMAGE_COLUMN])
        if isinstance(image, np.ndarray | list | tuple):
            return preprocess(_rgb(image))
        raise InvalidInput(f"{type(image).__name__} is not an image; give {ACCEPTED_INPUTS}")

    def _path(self, text: str) -> Path | None:
        """Return the path in a string if it is that of a file and files may be opened; else None."""
        if not self._may_open_files or len(text) > _PATH_CHARACTERS or "\0" in text:
            return None
        path = Path(text)
        try:
            return path if path.is_file() else None
        except OSError:  # the string is too long for a file name
            return None


def _each_image(given: Any) -> Iterator[Any]:
    """Yield the images in an input of any of the forms in `ACCEPTED_INPUTS`, one by one."""
    if hasattr(given, "columns"):  # a pandas table
        columns = list(given.columns)
        if IMAGE_COLUMN not in columns and len(columns) != 1:
            raise InvalidInput(f"a table needs a column {IMAGE_COLUMN!r}, or only one; this one has {columns}")
        yield from given[IMAGE_COLUMN if IMAGE_COLUMN in columns else columns[0]]
    elif isinstance(given, bytes | bytearray | memoryview | str | os.PathLike):
        yield given
    elif isinstance(given, Mapping):
        inner = given.get(IMAGE_COLUMN)
        if inner is None:
            raise InvalidInput(f"a mapping needs the key {IMAGE_COLUMN!r}; this one has {sorted(map(str, given))}")
        yield from _each_image(inner)
    elif isinstance(given, np.ndarray) and given.ndim == 0:
        yield from _each_image(given.item())
    elif (isinstance(given, np.ndarray) and given.ndim == 3) or (isinstance(given, list | tuple) and _depth(given) == 3):
        yield given
    elif isinstance(given, Sequence | np.ndarray) or hasattr(given, "__iter__"):
        yield from given
    else:
        raise InvalidInput(f"{type(given).__name__} is not an image; give {ACCEPTED_INPUTS}")


def _depth(value: Any) -> int:
    """Return how deeply numbers are nested in lists (3 for the pixels of one image); 0 if they are no numbers."""
    depth = 0
    while isinstance(value, list | tuple) and value:
        value, depth = value[0], depth + 1
    return depth if isinstance(value, int | float) else 0


def _rgb(pixels: Any) -> NDArray[np.uint8]:
    """Return pixels as (H, W, 3) uint8.

    Raises:
        InvalidInput: they have another shape, or are not whole numbers from 0 to 255.
    """
    array = np.asarray(pixels)
    if array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise InvalidInput(f"an array of shape {array.shape} is not an image; give {ACCEPTED_INPUTS}")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() > 255:
            raise InvalidInput(f"pixels are whole numbers from 0 to 255 (uint8); these are {array.dtype}")
        array = array.astype(np.uint8)
    return array


def _decoded(text: str) -> bytes:
    """Return the bytes encoded in a base64 string or a data URL."""
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        shown = f"{text[:60]!r}{'…' if len(text) > 60 else ''}"
        raise InvalidInput(f"{shown} is neither base64 nor a file that may be opened; give {ACCEPTED_INPUTS}") from None


def _top_k(params: Mapping[str, Any] | None, n_classes: int) -> int:
    asked = (params or {}).get("top_k")
    if asked is None:
        return min(DEFAULT_TOP_K, n_classes)
    if isinstance(asked, bool) or int(asked) != asked or not 1 <= asked <= n_classes:
        raise InvalidInput(f"top_k must be a whole number from 1 to {n_classes}, the number of classes (given: {asked})")
    return int(asked)


def _options(params: Mapping[str, Any] | None) -> CertaintyOptions:
    """Return the options in `params`; MLflow itself fills in the defaults, which are None."""
    given = {name: value for name in ASKED if (value := (params or {}).get(name)) is not None}
    return CertaintyOptions(**given)


def columns_of(manifest: Manifest) -> list[str]:
    """Return the columns that the table of `BundleModel.predict` always has for this bundle."""
    return ["label", "probability", "predictions", *([] if manifest.label_thresholds is None else ["labels"])]


def _row(probs: NDArray[np.float32], predictor: Predictor, top_k: int) -> dict[str, Any]:
    classes, order = predictor.manifest.classes, predictor.task.ranking(probs)[:top_k]
    predictions = [{"label": classes[index], "probability": float(probs[index])} for index in order]
    several = predictor.several_labels(probs)
    return {**predictions[0], "predictions": predictions, **({"labels": list(several.given)} if several else {})}


def _batches(values: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for value in values:
        batch.append(value)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
