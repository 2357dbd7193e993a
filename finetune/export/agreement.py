"""Compare an exported model with the trained network on image files, from preprocessed pixels and from encoded bytes.

The caller passes the trained network's outputs as a `Reference`, so this module is torch-free.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.predictor import Outputs, Predictor
from finetune.data.dataset import Sample
from finetune.errors import Problem

BATCH_SIZES = (1, 2, 7, 32)
MOST_PIXELS = 32 * 384**2  # of a batch: larger images are compared in smaller batches, so that memory stays bounded
N_IMAGES = 32

PROB_TOLERANCE = 1e-4
TIE_LOGITS = 1e-4  # two classes whose torch logits differ by less are tied, and their order does not count as a difference
CAM_TOLERANCE = 1e-4  # relative to the largest logit, absolute if that is below 1


@dataclass(frozen=True)
class Reference:
    """The trained network's outputs for some images, which the exported model is compared with."""

    outputs: Outputs  # without a cam: the exported one is checked by its mean
    head_bias: NDArray[np.float32]  # (C,)
    computed_by: str  # in words
    when_agreed: Callable[[], None] = lambda: None  # is called when the exported model agrees with them


@dataclass(frozen=True)
class Parity:
    """The largest differences between an exported model and the trained network.

    `n_flips` is the number of images with another top-1 class, without `n_ties`, the images whose top classes are tied in the
    trained network.
    """

    n_images: int
    batch_sizes: tuple[int, ...]
    max_prob_difference: float
    max_logit_difference: float
    n_flips: int
    n_ties: int
    min_embedding_cosine: float
    max_cam_error: float | None  # |mean(cam) + bias - logit| of the top class, as in CAM_TOLERANCE; None without a cam
    n_from_bytes: int
    max_prob_difference_from_bytes: float
    n_flips_from_bytes: int
    reference: str  # as `Reference.computed_by`

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the tolerances that were applied."""
        tolerances = {"prob": PROB_TOLERANCE, "tie_logits": TIE_LOGITS, "cam": CAM_TOLERANCE}
        return {**dataclasses.asdict(self), "batch_sizes": list(self.batch_sizes), "tolerances": tolerances}

    def problems(self) -> list[Problem]:
        """Return a problem for each difference above its tolerance; NaN is above every tolerance."""
        found = []
        for where, difference, n_flips in (
            ("training against ONNX", self.max_prob_difference, self.n_flips),
            ("training against bytes", self.max_prob_difference_from_bytes, self.n_flips_from_bytes),
        ):
            if not difference <= PROB_TOLERANCE:
                found.append(Problem(where, f"probabilities differ by {difference:.2g}, allowed is {PROB_TOLERANCE:g}"))
            if n_flips:
                found.append(Problem(where, f"{n_flips} predictions have another top-1 label"))
        if self.max_cam_error is not None and not self.max_cam_error <= CAM_TOLERANCE:
            found.append(Problem("cam", f"mean(cam) + bias misses the logit by {self.max_cam_error:.2g} of the largest logit"))
        return found


def parity_samples(samples: Sequence[Sample], n: int = N_IMAGES) -> list[Sample]:
    """Return at most `n` images to compare an export on: about equally many of each class, in the order of their sha256.

    The choice depends on the images only, so two runs on the same images compare the same ones, whatever their seeds.
    """
    ranks: Counter[tuple[int, ...]] = Counter()
    ranked: list[tuple[int, Sample]] = []
    for sample in sorted(samples, key=lambda sample: sample.sha256 or sample.id):
        ranks[sample.labels] += 1
        ranked.append((ranks[sample.labels], sample))
    return [sample for _, sample in sorted(ranked, key=lambda pair: pair[0])[:n]]


def batch_sizes_for(height: int, width: int) -> tuple[int, ...]:
    """Return the batch sizes that images of this size are compared in, the largest last."""
    return tuple(size for size in BATCH_SIZES if size <= 2 or size * height * width <= MOST_PIXELS)


def parity(
    reference: Reference, images: NDArray[np.uint8], predictor: Predictor, files: Sequence[bytes], *, n_from_bytes: int = 8
) -> Parity:
    """Compare `predictor` with the reference on all images in batches of each size, and on the first files one by one.

    Args:
        images: (N, h, w, 3) the preprocessed images that the reference was computed from.
        files: the same images, encoded. The predictor preprocesses them itself, so that a difference in preprocessing is found.
        n_from_bytes: the number of files to predict.
    """
    expected = reference.outputs
    sizes = batch_sizes_for(*images.shape[1:3])
    batches = (*sizes, *[sizes[-1]] * ((len(images) - 1) // sizes[-1]))
    taken = np.arange(sum(batches)) % len(images)  # images are repeated if there are too few
    given = _onnx_outputs(predictor, images[taken], batches)
    from_bytes = _probs_from_bytes(predictor, files[:n_from_bytes])

    n_flips, n_ties = _flips(expected.logits[taken], expected.probs[taken], given.logits.argmax(axis=1))
    n = len(from_bytes)
    n_flips_from_bytes, _ = _flips(expected.logits[:n], expected.probs[:n], from_bytes.argmax(axis=1))
    return Parity(
        n_images=len(images),
        batch_sizes=sizes,
        max_prob_difference=_largest_difference(expected.probs[taken], given.probs),
        max_logit_difference=_largest_difference(expected.logits[taken], given.logits),
        n_flips=n_flips,
        n_ties=n_ties,
        min_embedding_cosine=_least_cosine(expected.embedding[taken], given.embedding),
        max_cam_error=_cam_error(given, reference.head_bias),
        n_from_bytes=len(from_bytes),
        max_prob_difference_from_bytes=_largest_difference(expected.probs[: len(from_bytes)], from_bytes),
        n_flips_from_bytes=n_flips_from_bytes,
        reference=reference.computed_by,
    )


def _onnx_outputs(predictor: Predictor, images: np.ndarray, batch_sizes: Sequence[int]) -> Outputs:
    """Run N images (N, h, w, 3) uint8 through ONNX Runtime in batches of these sizes, whose sum is N."""
    ends = np.cumsum(batch_sizes)
    return joined([predictor.run(images[end - size : end]) for end, size in zip(ends, batch_sizes, strict=True)])


def _probs_from_bytes(predictor: Predictor, files: Sequence[bytes]) -> np.ndarray:
    """Return the probabilities (N, C) float32 that a client gets for N encoded files, in the order of the classes."""
    classes = predictor.manifest.classes
    answers = [dict(predictor.predict(data, top_k=len(classes)).labels) for data in files]
    return np.array([[answer[name] for name in classes] for answer in answers], np.float32)


def joined(parts: Sequence[Outputs]) -> Outputs:
    """Return the outputs of several batches as those of one batch."""
    cams = [part.cam for part in parts if part.cam is not None]
    return Outputs(
        probs=np.concatenate([part.probs for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
        embedding=np.concatenate([part.embedding for part in parts]),
        cam=np.concatenate(cams) if cams else None,
    )


def _largest_difference(expected: np.ndarray, given: np.ndarray) -> float:
    return float(np.abs(expected - given).max())


def _least_cosine(expected: np.ndarray, given: np.ndarray) -> float:
    one, other = expected.astype(np.float64), given.astype(np.float64)  # squares of diverged values overflow float32
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(1) / np.maximum(lengths, np.finfo(np.float32).tiny)).min())


def _flips(logits: np.ndarray, probs: np.ndarray, top: np.ndarray) -> tuple[int, int]:
    """Count the rows in which the top class differs.

    Classes with equal probabilities count as tied too: in a multilabel task, several probabilities may be exactly 1.

    Args:
        logits, probs: (B, C) of the reference.
        top: (B,) the top class according to the exported model.

    Returns:
        The number of rows whose top class differs and is not tied in the reference, and the number of tied ones.
    """
    rows = np.arange(len(logits))
    behind = logits.max(axis=1) - logits[rows, top]  # difference of torch's logits for its top class and the given one
    own = logits.argmax(axis=1)
    other = top != own
    tied = other & ((behind <= TIE_LOGITS) | (probs[rows, top] == probs[rows, own]))
    return int((other & ~tied).sum()), int(tied.sum())


def _cam_error(given: Outputs, bias: np.ndarray) -> float | None:
    """Return the largest |mean(cam) + bias - top logit|, relative to the largest logit if that is above 1."""
    if given.cam is None:
        return None
    top = given.logits.argmax(axis=1)
    rebuilt = given.cam.astype(np.float64).mean(axis=(1, 2)) + bias[top]
    error = np.abs(rebuilt - given.logits[np.arange(len(top)), top]).max()
    return float(error / max(1.0, float(np.abs(given.logits).max())))
