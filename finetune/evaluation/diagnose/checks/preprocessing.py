"""Wrong preprocessing: the frozen features tell the classes apart better when pixels are normalised in another way."""

from __future__ import annotations

from finetune.evaluation.diagnose.finding import Clear, Evidence, Finding, NotChecked, Verdict, confidence
from finetune.evaluation.diagnose.records import RunRecords

CLEARLY = 3.0  # standard errors, on the same images
GAIN = 0.01  # of the share of images that are answered rightly


class WrongPreprocessing:
    """The measurement is `finetune.runs.normalisation`: leave-one-out answers of a ridge head on a sample of training images."""

    code = "preprocessing"
    title = "Wrong preprocessing"
    explains = frozenset({"shuffled_labels", "underfitting", "collapsed_classes"})

    def look(self, records: RunRecords) -> Verdict:
        measured = records.preprocessing
        if measured is None:
            reason = (
                "weights that are drawn at random expect nothing"
                if not records.is_pretrained
                else "it was not measured in this run: finetune diagnose RUN --check-preprocessing does so"
            )
            return NotChecked(self.code, self.title, reason)
        own, others = measured["own"], measured["others"]
        best = max(others, key=lambda one: one["z"], default=None)
        figure = f"{own['name']}: {own['top1']:.1%} of {own['n']} images answered rightly when left out"
        if best is None or best["z"] < CLEARLY or best["top1"] - best["own_top1"] < GAIN:
            return Clear(self.code, self.title, figure)
        return Finding(
            self.code,
            self.title,
            "problem",
            confidence((best["z"] / CLEARLY) ** 2),
            f"the weights see more when pixels are given as {best['name']} ({best['top1']:.1%} of {best['n']} images answered "
            f"rightly when left out) than as {own['name']} ({best['own_top1']:.1%})",
            (
                Evidence(
                    "left-out images answered rightly",
                    f"{best['own_top1']:.1%} as {own['name']}, {best['top1']:.1%} as {best['name']}",
                ),
                Evidence("difference of squared errors", f"{best['z']:.1f} standard errors", f"below {CLEARLY:.0f}"),
            ),
            (
                "find out how the weights were trained: mean and deviation, order of the channels, pixels in 0..1 or 0..255",
                "convert the weights (swap the input channels of the first convolution, or scale it), or save the images in RGB",
            ),
            "leave-one-out by ridge regression in closed form: Allen 1974 (PRESS)",
        )
