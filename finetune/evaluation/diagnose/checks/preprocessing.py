"""Wrong preprocessing: the pretrained weights were trained with another normalisation of pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.records import RunRecords

NEARER = 0.15  # natural logarithm of a ratio of divergences; red and blue exchanged give 0.23, another scale 1.7 and more
CLEARLY = 3.5  # standard errors, over groups of images
CONTRADICTED = -3.0  # standard errors: with so much lower accuracy on left-out images the other normalisation is rejected
LEFT_OUT_CLEARLY = 4.0  # standard errors; higher, since the best of five candidates is tested
LEFT_OUT_GAIN = 0.03  # of top-1 accuracy on left-out images


class WrongPreprocessing:
    """Compares the normalisation in use with others, by the measurements of `finetune.runs.normalisation`.

    In a network with batch normalisation its running statistics decide. Otherwise the accuracy on left-out images does; that
    also depends on the user's classes, so it must differ more.
    """

    code = "preprocessing"
    title = "Wrong preprocessing"
    explains = frozenset({"shuffled_labels", "underfitting", "collapsed_classes", "degradation", "overfitting"})

    def check(self, records: RunRecords) -> CheckOutcome:
        measured = records.preprocessing
        if measured is None:
            reason = (
                "random weights expect no particular preprocessing"
                if not records.is_pretrained
                else "finetune diagnose RUN --check-preprocessing measures it"
            )
            return NotChecked(self.code, self.title, reason)
        own = measured["own"]["name"]
        strengths = {other["name"]: _strength(other) for other in measured["others"]}
        best = max(measured["others"], key=lambda other: strengths[other["name"]], default=None)
        if best is None or strengths[best["name"]] < 1:
            n_others = len(measured["others"])
            return Clear(self.code, self.title, f"no evidence for one of {n_others} other ways instead of {own}")
        return Finding(
            self.code,
            self.title,
            "problem",
            confidence(strengths[best["name"]]),
            f"pixels are given as {own}, and the pretrained weights seem to expect {best['name']}",
            tuple(_evidence(best, own)),
            (
                "find out how the weights were trained: mean and deviation, order of the channels, pixels in 0..1 or 0..255",
                "convert the weights (swap the input channels of the first convolution, or scale it), or save the images in RGB",
            ),
            "remembered statistics: Ioffe & Szegedy 2015, arXiv:1502.03167; leave-one-out in closed form: Allen 1974 (PRESS)",
        )


def _strength(other: Mapping[str, Any]) -> float:
    """Return the evidence for another normalisation in multiples of the threshold."""
    statistics, left_out = other["statistics"], other["left_out"]
    if statistics is not None:
        contradicted = left_out is not None and left_out["z"] < CONTRADICTED
        strength = min(statistics["gain"] / NEARER, (max(statistics["z"], 0.0) / CLEARLY) ** 2)
        return 0.0 if contradicted else strength
    gain = left_out["top1"] - left_out["own_top1"]
    return float(min(gain / LEFT_OUT_GAIN, (max(left_out["z"], 0.0) / LEFT_OUT_CLEARLY) ** 2))


def _evidence(best: Mapping[str, Any], own: str) -> list[Evidence]:
    statistics, left_out = best["statistics"], best["left_out"]
    found = []
    if statistics is not None:
        gain = statistics["gain"]
        found.append(
            Evidence(
                "distance of the lower activations from the running statistics of batch normalisation",
                f"{math.exp(gain):.2g} times smaller as {best['name']} ({statistics['z']:.1f} standard errors)",
                f"smallest as {own}",
            )
        )
    if left_out is not None:
        found.append(
            Evidence(
                f"of {left_out['n']} images, predicted correctly when left out",
                f"{left_out['own_top1']:.1%} as {own}, {left_out['top1']:.1%} as {best['name']}",
            )
        )
    return found
