"""Compare an exported model with the trained one on real files: torch, ONNX and encoded bytes side by side.

The caller gives torch's answers as a `Reference`. Torch-free.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.predictor import Outputs, Predictor
from finetune.data.dataset import Sample
from finetune.errors import Problem

BATCH_SIZES = (1, 2, 7, 32)
N_IMAGES = 32

PROB_TOLERANCE = 1e-4
TIE_LOGITS = 1e-4  # two classes whose torch logits are closer than this are tied; which of them comes first is not a flip
CAM_TOLERANCE = 1e-4  # of the largest logit, or absolute where that is under 1


@dataclass(frozen=True)
class Reference:
    """Torch's answers to some images, which the exported model is compared with."""

    outputs: Outputs  # without a cam: the exported one is checked by its mean
    head_bias: NDArray[np.float32]  # (C,)
    source: str  # in words: which torch, and in which process


@dataclass(frozen=True)
class Parity:
    """The largest differences found. `n_flips` counts other top-1 answers, `n_ties` those of them where torch itself was tied."""

    n_images: int
    batch_sizes: tuple[int, ...]
    max_prob_difference: float
    max_logit_difference: float
    n_flips: int
    n_ties: int
    min_embedding_cosine: float
    max_cam_error: float | None  # |mean(cam) + bias - logit| of the top class, as CAM_TOLERANCE counts; None without a cam
    n_from_bytes: int
    max_prob_difference_from_bytes: float
    n_flips_from_bytes: int
    reference: str  # as `Reference.source`

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, with the tolerances that were applied."""
        tolerances = {"prob": PROB_TOLERANCE, "tie_logits": TIE_LOGITS, "cam": CAM_TOLERANCE}
        return {**dataclasses.asdict(self), "batch_sizes": list(self.batch_sizes), "tolerances": tolerances}

    def problems(self) -> list[Problem]:
        """What is over its tolerance; a NaN is over every one."""
        found = []
        for where, difference, n_flips in (
            ("torch against ONNX", self.max_prob_difference, self.n_flips),
            ("torch against bytes", self.max_prob_difference_from_bytes, self.n_flips_from_bytes),
        ):
            if not difference <= PROB_TOLERANCE:
                found.append(Problem(where, f"probabilities differ by {difference:.2g}, allowed is {PROB_TOLERANCE:g}"))
            if n_flips:
                found.append(Problem(where, f"{n_flips} answers have another top-1 label"))
        if self.max_cam_error is not None and not self.max_cam_error <= CAM_TOLERANCE:
            found.append(Problem("cam", f"mean(cam) + bias misses the logit by {self.max_cam_error:.2g} of the largest logit"))
        return found


def parity_samples(samples: Sequence[Sample], n: int = N_IMAGES) -> list[Sample]:
    """Return the images that an export is compared on: of all classes alike, in an order that only their bytes decide.

    So two runs on the same images compare the same ones, whatever their seeds.
    """
    ranks: Counter[tuple[int, ...]] = Counter()
    ranked: list[tuple[int, Sample]] = []
    for sample in sorted(samples, key=lambda sample: sample.sha256 or sample.id):
        ranks[sample.labels] += 1
        ranked.append((ranks[sample.labels], sample))
    return [sample for _, sample in sorted(ranked, key=lambda pair: pair[0])[:n]]


def parity(
    reference: Reference, images: NDArray[np.uint8], predictor: Predictor, files: Sequence[bytes], *, n_from_bytes: int = 8
) -> Parity:
    """Compare `predictor` with the reference on all images in batches of each size, and on the first files one by one.

    Args:
        images: (N, h, w, 3) what torch was shown; framed by the predictor itself only where it reads `files`, so that a bundle
            which frames images otherwise is found out.
        files: the encoded images.
    """
    expected = reference.outputs
    batch_sizes = (*BATCH_SIZES, *[BATCH_SIZES[-1]] * ((len(images) - 1) // BATCH_SIZES[-1]))
    taken = np.arange(sum(batch_sizes)) % len(images)  # where images run out, they start over
    given = _onnx_outputs(predictor, images[taken], batch_sizes)
    from_bytes = _probs_from_bytes(predictor, files[:n_from_bytes])

    n_flips, n_ties = _flips(expected.logits[taken], expected.probs[taken], given.logits.argmax(axis=1))
    n = len(from_bytes)
    n_flips_from_bytes, _ = _flips(expected.logits[:n], expected.probs[:n], from_bytes.argmax(axis=1))
    return Parity(
        n_images=len(images),
        batch_sizes=BATCH_SIZES,
        max_prob_difference=_furthest(expected.probs[taken], given.probs),
        max_logit_difference=_furthest(expected.logits[taken], given.logits),
        n_flips=n_flips,
        n_ties=n_ties,
        min_embedding_cosine=_least_cosine(expected.embedding[taken], given.embedding),
        max_cam_error=_cam_error(given, reference.head_bias),
        n_from_bytes=len(from_bytes),
        max_prob_difference_from_bytes=_furthest(expected.probs[: len(from_bytes)], from_bytes),
        n_flips_from_bytes=n_flips_from_bytes,
        reference=reference.source,
    )


def _onnx_outputs(predictor: Predictor, images: np.ndarray, batch_sizes: Sequence[int]) -> Outputs:
    """(N, h, w, 3) uint8, N the sum of `batch_sizes`, through ONNX Runtime in batches of just these sizes."""
    ends = np.cumsum(batch_sizes)
    return joined([predictor.run(images[end - size : end]) for end, size in zip(ends, batch_sizes, strict=True)])


def _probs_from_bytes(predictor: Predictor, files: Sequence[bytes]) -> np.ndarray:
    """(N, C) float32: what a client that sends the files gets, in the order of the classes."""
    classes = predictor.manifest.classes
    answers = [dict(predictor.predict(data, top_k=len(classes)).labels) for data in files]
    return np.array([[answer[name] for name in classes] for answer in answers], np.float32)


def joined(parts: Sequence[Outputs]) -> Outputs:
    """Return the outputs of several batches as those of one."""
    cams = [part.cam for part in parts if part.cam is not None]
    return Outputs(
        probs=np.concatenate([part.probs for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
        embedding=np.concatenate([part.embedding for part in parts]),
        cam=np.concatenate(cams) if cams else None,
    )


def _furthest(expected: np.ndarray, given: np.ndarray) -> float:
    return float(np.abs(expected - given).max())


def _least_cosine(expected: np.ndarray, given: np.ndarray) -> float:
    one, other = expected.astype(np.float64), given.astype(np.float64)  # squares of what diverged overflow float32
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(1) / np.maximum(lengths, np.finfo(np.float32).tiny)).min())


def _flips(logits: np.ndarray, probs: np.ndarray, top: np.ndarray) -> tuple[int, int]:
    """How many of `top` (B,) are not the top class of `logits` (B, C): real flips, and ties.

    Classes whose probabilities are the same number are tied too: of several labels that an image surely has, each is exactly 1.
    """
    rows = np.arange(len(logits))
    behind = logits.max(axis=1) - logits[rows, top]  # how far torch puts the given class behind its own
    own = logits.argmax(axis=1)
    other = top != own
    tied = other & ((behind <= TIE_LOGITS) | (probs[rows, top] == probs[rows, own]))
    return int((other & ~tied).sum()), int(tied.sum())


def _cam_error(given: Outputs, bias: np.ndarray) -> float | None:
    """How far mean(cam) + bias is from the top logit, in units of the largest logit."""
    if given.cam is None:
        return None
    top = given.logits.argmax(axis=1)
    rebuilt = given.cam.astype(np.float64).mean(axis=(1, 2)) + bias[top]
    error = np.abs(rebuilt - given.logits[np.arange(len(top)), top]).max()
    return float(error / max(1.0, float(np.abs(given.logits).max())))
