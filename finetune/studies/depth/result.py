"""The result of a depth study: measurements of every network, and sentences about them that are composed by fixed rules.

Degradation means that the training error rises with depth (He et al. 2016, arXiv:1512.03385). It is tested on the same training
images, by the same check as in `finetune diagnose --against`. If no network degrades, the sentences say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.evaluation.diagnose import RunRecords, diagnose_records
from finetune.evaluation.diagnose.records import HEAD
from finetune.evaluation.diagnose.statistics import mean_of, paired
from finetune.model.depth import Aid
from finetune.studies.depth.request import DepthRequest, Network

WITH_AID: Mapping[Aid, str] = {"": "PyTorch's default initialisation", "he": "He initialisation", "bn": "batch normalisation"}
CLEARLY = 2.0  # standard errors
LESS_ERROR = 0.02  # reduction of the training error that counts as an effect of the shortcut
VANISHED, EXPLODED = -3.0, 3.0  # powers of ten by which the gradient changes from the top of a network to its stem


@dataclass(frozen=True)
class NetworkResult:
    """The measurements of one trained network."""

    network: Network
    run: Path
    n_parameters: int
    train_error: float  # on the sample of training images, in evaluation mode, at the end
    train_error_se: float
    val_error: float  # at the end
    errors: tuple[tuple[float, float], ...]  # (epoch, error while training)
    gradients: tuple[float, ...]  # gradient norm over weight norm by block, from the stem up, early in training
    gradients_at_step: int
    seconds: float
    degraded_against: str | None  # name of a shallower network whose training error is significantly lower
    findings: tuple[str, ...]  # codes of the run's diagnosis against the best shallower network, causes first

    @property
    def decades(self) -> float | None:
        """The powers of ten by which the gradient grows from the upper to the lower third of the blocks; negative: it shrinks."""
        if not self.gradients:
            return None
        third = max(len(self.gradients) // 3, 1)
        low, high = np.median(self.gradients[:third]), np.median(self.gradients[-third:])
        return float(np.log10(low / high)) if low > 0 and high > 0 else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.network.name,
            "kind": self.network.kind,
            "aid": self.network.aid or "none",
            "depth": self.network.depth,
            "run": str(self.run),
            "parameters": self.n_parameters,
            "train_error": self.train_error,
            "train_error_se": self.train_error_se,
            "val_error": self.val_error,
            "errors": [list(point) for point in self.errors],
            "gradients": list(self.gradients),
            "gradients_at_step": self.gradients_at_step,
            "gradient_decades": self.decades,
            "seconds": self.seconds,
            "degraded_against": self.degraded_against,
            "findings": list(self.findings),
        }


@dataclass(frozen=True)
class Shortcut:
    """A plain and a residual network of the same depth and aid, compared on the same training images."""

    aid: Aid
    depth: int
    plain_error: float
    residual_error: float
    gain: float  # of the training error
    gain_se: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "aid": self.aid or "none"}


@dataclass(frozen=True)
class DepthStudy:
    """The result of a depth study."""

    id: str
    folder: Path
    request: DepthRequest
    dataset: str
    n_train: int
    n_val: int
    n_epochs: int
    networks: tuple[NetworkResult, ...]
    shortcuts: tuple[Shortcut, ...]
    cost: Mapping[str, float]

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def of(self, kind: str, aid: Aid) -> tuple[NetworkResult, ...]:
        """Return the networks of one family (kind and aid) in order of their depth."""
        return tuple(one for one in self.networks if one.network.kind == kind and one.network.aid == aid)

    def to_dict(self) -> dict[str, Any]:
        """Return the study as JSON values, with its sentences."""
        return {
            "object": "depth_study",
            "schema_version": 1,
            "id": self.id,
            "dataset": self.dataset,
            "request": self.request.to_dict(),
            "n_train": self.n_train,
            "n_val": self.n_val,
            "n_epochs": self.n_epochs,
            "sentence": headline(self),
            "paragraphs": list(paragraphs(self)),
            "networks": [one.to_dict() for one in self.networks],
            "shortcuts": [one.to_dict() for one in self.shortcuts],
            "cost": dict(self.cost),
            "report": str(self.report),
        }


def network_results(
    request: DepthRequest, records: Mapping[Network, RunRecords], seconds: Mapping[Network, float]
) -> tuple[NetworkResult, ...]:
    """Return the measurements of every network, family by family. A pure function of the runs' records."""
    found: list[NetworkResult] = []
    for kind in request.kinds:
        for aid in request.aids:
            family = [network for network in request.networks if (network.kind, network.aid) == (kind, aid)]
            for position, network in enumerate(family):
                best = min(family[:position], key=lambda one: _train_error(records[one]), default=None)
                found.append(
                    _result(network, records[network], seconds[network], None if best is None else (best, records[best]))
                )
    return tuple(found)


def shortcut_gains(request: DepthRequest, records: Mapping[Network, RunRecords]) -> tuple[Shortcut, ...]:
    """Compare the plain and the residual network of the greatest depth, for every aid; empty if only one kind was trained."""
    if len(request.kinds) < 2:
        return ()
    found, depth = [], request.depths[-1]
    for aid in request.aids:
        plain, residual = records[Network("plain", aid, depth)], records[Network("residual", aid, depth)]
        first, second = plain.last_sample, residual.last_sample
        assert first is not None
        assert second is not None
        gain = paired(first, second, plain.scores(first), residual.scores(second))
        if gain is not None:
            found.append(Shortcut(aid, depth, _train_error(plain), _train_error(residual), gain.value, gain.error))
    return tuple(found)


def _train_error(records: RunRecords) -> float:
    sample = records.last_sample
    assert sample is not None, "every run of the study answers a sample of training images"
    return 1.0 - float(records.scores(sample).mean())


def _result(network: Network, records: RunRecords, seconds: float, shallower: tuple[Network, RunRecords] | None) -> NetworkResult:
    """Return the measurements of one network, compared with the best shallower one."""
    sample = records.last_sample
    assert sample is not None
    score = mean_of(records.scores(sample))
    diagnosis = diagnose_records(replace(records, against=None if shallower is None else shallower[1]))
    degraded = diagnosis.finding("degradation") is not None
    step, gradients = _early_gradients(records)
    last_val = records.last_val
    return NetworkResult(
        network=network,
        run=records.run.root,
        n_parameters=int(records.resolved["backbone"]["n_parameters"]),
        train_error=1.0 - score.value,
        train_error_se=score.error,
        val_error=1.0 - last_val[1] if last_val else float("nan"),
        errors=tuple((epoch, 1.0 - value) for epoch, value in records.curve(f"train/{records.score.key}")),
        gradients=gradients,
        gradients_at_step=step,
        seconds=seconds,
        degraded_against=shallower[0].name if degraded and shallower else None,
        findings=tuple(finding.code for finding in diagnosis.problems if finding.code != "collapsed_classes"),
    )


def _early_gradients(records: RunRecords) -> tuple[int, tuple[float, ...]]:
    """Return the earliest step after step 0 with measured gradients, and each block's gradient norm divided by its weight norm.

    Step 0 is not used: the head is initialised with zeros, so no gradient reaches the blocks at that step.
    """
    parts = [part for part in records.parts if part != HEAD]
    steps = sorted({step for part in parts for step, _ in records.signal("grad_norm", part) if step > 0})
    if not steps:
        return 0, ()
    at = [(dict(records.signal("grad_norm", one))[steps[0]], dict(records.signal("weight_norm", one))[steps[0]]) for one in parts]
    return int(steps[0]), tuple(gradient / max(weight, 1e-12) for gradient, weight in at)


# ── in words ──────────────────────────────────────────────────────────────────────────────────────


def headline(study: DepthStudy) -> str:
    """Return one sentence with the main result of the study."""
    plain = [family for aid in study.request.aids if (family := study.of("plain", aid))]
    degraded = [family for family in plain if family[-1].degraded_against]
    residual = [family for aid in study.request.aids if (family := study.of("residual", aid))]
    deepest = study.request.depths[-1]
    if not plain:
        worst = max(family[-1].train_error for family in residual)
        return f"Residual networks of up to {deepest} layers answer at most {worst:.1%} of their training images wrongly."
    networks = [network for family in plain for network in family]
    if not degraded and all("underfitting" in network.findings for network in networks):
        least = min(network.train_error for network in networks)
        return (
            f"The effect of depth cannot be seen: all plain networks underfit (training error at least {least:.0%}). Train "
            "longer, with more --epochs, or on more images."
        )
    if not degraded:
        return (
            f"No degradation on these images: up to {deepest} layers, the training error of plain networks does not rise clearly "
            "with depth."
        )
    one = max(degraded, key=lambda family: family[-1].train_error)
    shallow = next(network for network in one if network.network.name == one[-1].degraded_against)
    text = (
        f"Plain networks degrade: with {deepest} layers {one[-1].train_error:.0%} of the training images are predicted wrongly, "
        f"with {shallow.network.depth} layers {shallow.train_error:.0%}"
    )
    if not residual:
        return f"{text}."
    same = study.of("residual", one[-1].network.aid)[-1]
    if same.train_error > one[-1].train_error - LESS_ERROR:
        return f"{text}; identity shortcuts do not help here: {same.train_error:.0%} with the same {deepest} layers."
    if any(family[-1].degraded_against for family in residual):
        return f"{text}; with identity shortcuts it is {same.train_error:.0%}, and some of those networks degrade too."
    return f"{text}; identity shortcuts cure it: {same.train_error:.0%} with the same {deepest} layers."


def paragraphs(study: DepthStudy) -> list[str]:
    """Return a paragraph for each family and for each shortcut, and one about overfitting if a network degraded."""
    found = [_of_family(study, aid) for aid in study.request.aids]
    found += [_of_shortcut(shortcut) for shortcut in study.shortcuts]
    found.append(_not_overfitting(study))
    return [text for text in found if text]


def _of_family(study: DepthStudy, aid: Aid) -> str:
    """Describe the training errors of the plain networks with one aid, and the gradients of the deepest one."""
    family = study.of("plain", aid)
    if not family:
        return ""
    errors = ", ".join(f"{one.network.depth} layers {one.train_error:.1%}" for one in family)
    text = f"Plain networks with {WITH_AID[aid]}: training error {errors}."
    degraded = [one for one in family if one.degraded_against]
    if degraded:
        text += (
            f" The one with {degraded[0].network.depth} layers is clearly worse than {degraded[0].degraded_against}: degradation."
        )
    elif len(family) > 1:
        text += " It does not rise clearly with depth."
    return f"{text} {_of_gradients(family[-1])}"


def _of_gradients(one: NetworkResult) -> str:
    decades, depth = one.decades, one.network.depth
    at = f"At step {one.gradients_at_step}, with {depth} layers,"
    if not one.gradients:
        return ""
    if not any(one.gradients):
        return f"{at} no gradient at all reaches a block: every one of them is exactly zero."
    if decades is None:
        blocks = sum(value == 0 for value in one.gradients)
        return (
            f"{at} the gradients vanish: in {blocks} of {len(one.gradients)} blocks they are exactly zero, too small for float32."
        )
    if decades <= VANISHED:
        return f"{at} the lower blocks get 10^{decades:.0f} of the relative gradient of the upper ones: vanishing gradients."
    if decades >= EXPLODED:
        return f"{at} the lower blocks get 10^{decades:.0f} times the relative gradient of the upper ones: exploding gradients."
    if max(one.gradients) < 1e-5:
        return (
            f"{at} gradients are alike from the stem to the top, so they do not vanish on the way down; they are small all over "
            f"(at most {max(one.gradients):.0e} of the weights), because all images look nearly the same at the top."
        )
    factor = f"{10**decades:,.{0 if decades >= 1 else 1}f}"
    return f"{at} gradients do not vanish on the way down ({factor} times as large at the bottom as at the top)."


def _of_shortcut(shortcut: Shortcut) -> str:
    """Describe the effect of the shortcut, which is the only difference: both networks have the same number of parameters."""
    given = f"With {WITH_AID[shortcut.aid]} and {shortcut.depth} layers"
    before, after, gain, error = shortcut.plain_error, shortcut.residual_error, shortcut.gain, shortcut.gain_se
    if gain > max(LESS_ERROR, CLEARLY * error):
        return (
            f"{given}, the identity shortcut alone, which adds no parameter, lowers the training error from {before:.1%} to "
            f"{after:.1%} ({100 * gain:.0f} ± {100 * error:.0f} points on the same images)."
        )
    if gain < -max(LESS_ERROR, CLEARLY * error):
        return f"{given}, the shortcut raises the training error here, from {before:.1%} to {after:.1%}."
    return f"{given}, the shortcut changes the training error little: {before:.1%} without, {after:.1%} with it."


def _not_overfitting(study: DepthStudy) -> str:
    degraded = [one for one in study.networks if one.degraded_against]
    if not degraded or any("overfitting" in one.findings for one in degraded):
        return ""
    return (
        "This is not overfitting, which lowers the training error and leaves the validation error high: in each network that "
        "degraded, the training error itself is high."
    )
