"""What a diagnosis says of records: each fault by its own name, nothing of a healthy run, and never one thing for another."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import table
from diagnosed import (
    CLASSES,
    N_STEPS,
    answered,
    journal,
    measured_preprocessing,
    neighbours,
    resolved,
    run_records,
    write_run,
)

from finetune.errors import NotFound
from finetune.evaluation import predictions as tables
from finetune.evaluation.diagnose import Diagnosis, RunRecords, diagnose, diagnose_records
from finetune.evaluation.diagnose.checks import CHECKS
from finetune.evaluation.diagnose.finding import confidence
from finetune.evaluation.diagnose.statistics import log_binomial_tail, mean_of, paired, share, slope
from finetune.evaluation.predictions import Predictions
from finetune.storage.files import write_json
from finetune.storage.rundir import RunDir
from finetune.training.measurements import NEIGHBOURS_COLUMNS, pool_neighbours


def merged(n: int = 200) -> Any:
    """Answers in which the first class stands for the last one too."""
    labels = np.arange(n) % len(CLASSES)
    answers = np.where(labels == len(CLASSES) - 1, 0, labels)
    logits = np.zeros((n, len(CLASSES)), dtype=np.float32)
    logits[np.arange(n), answers] = 4.0
    return table(logits, labels, CLASSES)


STUCK = {0: answered(200, 0.25, sureness=0.01), N_STEPS: answered(200, 0.25, sureness=0.01)}
FROM_SCRATCH = {"resolved": resolved(solved=False, pretrained=False), "neighbours": []}
HIGH_RATE = resolved(rate=0.1)
LOW_RATE = resolved(rate=1e-7)
WORSE = {0: answered(200, 0.9, sureness=2.0), N_STEPS: answered(200, 0.5)}
FROZEN = {"outcome": {"frozen": {"stages": ["blocks.0"], "digest_before": "a", "digest_after": "b"}}}

FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "overfitting by a large gap": ("overfitting", {"lines": journal(val=[(0.6, 0.6)] * 6)}),
    "overfitting after the val loss turned": (
        "overfitting",
        {"lines": journal(val=[(0.5, 0.8), (0.4, 0.82), (0.5, 0.81), (0.8, 0.8), (1.2, 0.79), (1.6, 0.78)])},
    ),
    "underfitting": (
        "underfitting",
        {**FROM_SCRATCH, "samples": {0: STUCK[0], N_STEPS: answered(200, 0.6)}, "lines": journal(val=[(1.0, 0.6)] * 6)},
    ),
    "degradation": ("degradation", {"samples": WORSE, "lines": journal(val=[(1.0, 0.5)] * 6)}),
    "vanishing": (
        "vanishing_gradients",
        {**FROM_SCRATCH, "samples": STUCK, "lines": journal(gradients={f"stage{i}": [100.0 ** (i - 6)] * 5 for i in range(6)})},
    ),
    "exploding": (
        "exploding_gradients",
        {"samples": WORSE, "lines": journal(gradients={"stage2": [0.5, 0.5, 40.0, 400.0, 900.0]})},
    ),
    "diverged": ("exploding_gradients", {"error": {"message": "the loss became nan at step 7. Try less"}, "samples": {}}),
    "dead units": ("dead_units", {"samples": WORSE, "lines": journal(dead={"stage3": (0.05, 0.7)})}),
    "rate too high": ("learning_rate_high", {"samples": WORSE, "resolved": HIGH_RATE}),
    "rate too low": (
        "learning_rate_low",
        {
            "resolved": LOW_RATE,
            "samples": {0: answered(200, 0.9), N_STEPS: answered(200, 0.9)},
            "lines": journal(ratios={f"stage{index}": 1e-7 for index in range(6)}, val=[(0.4, 0.9)] * 6),
        },
    ),
    "shuffled": (
        "shuffled_labels",
        {
            "held_out": {"val": answered(200, 0.25, prefix="val")},
            "lines": journal(val=[(2.0, 0.25)] * 6),
            "samples": {0: answered(200, 0.5), N_STEPS: answered(200, 0.99)},
        },
    ),
    "leakage": ("leakage", {"neighbours": neighbours(60)}),
    "collapsed": ("collapsed_classes", {"held_out": {"val": merged()}}),
    "a stage without gradient": (
        "frozen_stage",
        {
            "lines": [
                {**line, "values": {key: value for key, value in line["values"].items() if not key.endswith("/stage2")}}
                for line in journal()
            ]
        },
    ),
    "a stage without steps": ("frozen_stage", {"lines": journal(ratios={"stage2": 0.0})}),
    "a frozen stage that changed": ("frozen_stage", FROZEN),
    "preprocessing by statistics": ("preprocessing", {"preprocessing": measured_preprocessing(1.2)}),
    "preprocessing by left-out images": ("preprocessing", {"preprocessing": measured_preprocessing(None, (0.6, 0.7, 6.0))}),
}  # fmt: skip


def test_every_finding_has_a_fault_here() -> None:
    assert {code for code, _ in FAULTS.values()} | {"overconfidence"} == {check.code for check in CHECKS}


@pytest.mark.parametrize(("code", "given"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_first_with_evidence_and_advice(code: str, given: dict[str, Any]) -> None:
    found = diagnose_records(run_records(**given))
    assert [finding.code for finding in found.problems][:1] == [code], found.sentence
    first = found.problems[0]
    assert first.caused_by is None
    assert first.confidence >= 0.5
    assert first.evidence
    assert first.advice
    assert first.source
    assert first.title.lower() in found.sentence


def test_nothing_is_wrong_with_a_healthy_run() -> None:
    found = diagnose_records(run_records())
    assert found.findings == ()
    assert {one.code for one in found.clear} | {one.code for one in found.not_checked} == {check.code for check in CHECKS}
    assert [one.code for one in found.not_checked] == ["preprocessing"]
    assert found.sentence.startswith("nothing is wrong")


def test_a_solved_head_alone_is_healthy_and_what_needs_steps_is_not_checked() -> None:
    plan = resolved(n_steps=0)
    found = diagnose_records(run_records(resolved=plan, lines=[], samples={0: answered(200, 0.95)}))
    assert found.findings == ()
    assert {"learning_rate_high", "vanishing_gradients", "degradation"} <= {one.code for one in found.not_checked}


# ── one thing is not taken for another ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("train", [0.55, 0.7, 0.8, 0.92, 1.0])
@pytest.mark.parametrize("val", [0.5, 0.7, 0.85, 0.95])
@pytest.mark.parametrize("start", [0.6, 0.8, 0.95])
def test_a_run_is_never_both_degraded_and_overfitted(train: float, val: float, start: float) -> None:
    samples = {0: answered(400, start, seed=2, sureness=2.0), N_STEPS: answered(400, train)}
    lines = journal(val=[(0.3, val), (0.3, val), (0.5, val), (1.0, val), (2.0, val), (3.0, val)])
    codes = {finding.code for finding in diagnose_records(run_records(samples=samples, lines=lines)).findings}
    assert not {"degradation", "overfitting"} <= codes
    if train < start - 0.1:
        assert "degradation" in codes, "the training error rose"
    if train == 1.0 and val <= 0.7:
        assert "overfitting" in codes


def test_degradation_is_judged_against_a_shallower_run_too() -> None:
    shallow = run_records(resolved=resolved(solved=False, pretrained=False))
    deep = run_records(resolved=resolved(solved=False, pretrained=False), samples={0: STUCK[0], N_STEPS: answered(200, 0.7)})
    assert diagnose_records(deep).finding("degradation") is None
    found = diagnose_records(replace(deep, against=shallow))
    assert found.problems[0].code == "degradation"
    assert found.against == "some-run"
    underfitting = found.finding("underfitting")
    assert underfitting is None or underfitting.caused_by == "degradation"


def test_a_gap_alone_is_a_note() -> None:
    found = diagnose_records(run_records(lines=journal(val=[(0.6, 0.78)] * 6)))
    (finding,) = found.findings
    assert (finding.code, finding.severity) == ("overfitting", "note")
    assert found.sentence.startswith("nothing is wrong")


def test_a_gap_of_a_quarter_is_a_problem() -> None:
    found = diagnose_records(run_records(lines=journal(val=[(0.6, 0.72)] * 6)))
    (finding,) = found.findings
    assert (finding.code, finding.severity) == ("overfitting", "problem")


@pytest.mark.parametrize(("n", "underfits"), [(60, False), (600, True)])
def test_a_few_training_images_show_underfitting_only_beyond_their_sampling_error(n: int, underfits: bool) -> None:
    samples = {0: answered(n, 0.6, sureness=2.0), N_STEPS: answered(n, 0.8)}
    found = diagnose_records(run_records(samples=samples, lines=journal(val=[(0.6, 0.79)] * 6)))
    assert (found.finding("underfitting") is not None) == underfits


@pytest.mark.parametrize(("recall", "collapsed"), [(0.97, True), (0.7, False)])
def test_a_class_that_is_not_learnt_yet_has_not_collapsed(recall: float, collapsed: bool) -> None:
    unlearnt = answered(400, recall, prefix="val")
    logits = unlearnt.logits.copy()
    logits[:, -1] = -9.0  # the last class is never answered
    found = diagnose_records(run_records(held_out={"val": replace(unlearnt, logits=logits)}))
    assert (found.finding("collapsed_classes") is not None) == collapsed


def test_a_loss_that_rises_while_errors_fall_is_overconfidence() -> None:
    lines = journal(val=[(0.3, 0.9), (0.3, 0.91), (0.5, 0.92), (1.0, 0.93), (1.5, 0.93), (2.0, 0.93)])
    (finding,) = diagnose_records(run_records(lines=lines)).findings
    assert (finding.code, finding.severity) == ("overconfidence", "note")


def certain(n: int, *, right: bool) -> Any:
    """Answers that are all right or all wrong, with probabilities of exactly 0 and 1: no image differs from another."""
    labels = np.arange(n) % len(CLASSES)
    logits = np.full((n, len(CLASSES)), -500.0, dtype=np.float32)
    logits[np.arange(n), labels if right else (labels + 1) % len(CLASSES)] = 500.0
    return table(logits, labels, CLASSES)


def test_images_that_do_not_differ_at_all_are_judged_too() -> None:
    all_right = {"held_out": {"val": certain(6, right=True)}, "lines": journal(val=[(0.0, 1.0)] * 6)}
    assert diagnose_records(run_records(**all_right)).finding("overconfidence") is None
    rising = [(0.0, 0.0)] * 2 + [(900.0, 0.0)] * 4
    all_wrong = {"held_out": {"val": certain(6, right=False)}, "samples": {N_STEPS: certain(200, right=True)}}
    found = diagnose_records(run_records(**all_wrong, lines=journal(val=rising)))
    assert found.finding("overfitting") is not None


def test_large_steps_that_do_no_harm_are_fine() -> None:
    assert diagnose_records(run_records(resolved=HIGH_RATE)).findings == ()


def test_gradients_that_grow_from_a_head_of_zeros_do_not_explode() -> None:
    lines = journal(gradients={f"stage{index}": [0.0, 1e-3, 0.01, 0.1, 0.4] for index in range(6)})
    found = diagnose_records(run_records(**{**FROM_SCRATCH, "samples": STUCK, "lines": lines}))
    assert found.finding("exploding_gradients") is None


def test_a_few_twins_are_ordinary() -> None:
    assert diagnose_records(run_records(neighbours=neighbours(3))).findings == ()


@pytest.mark.parametrize(
    "measured",
    [
        measured_preprocessing(0.05),
        measured_preprocessing(-1.5),
        measured_preprocessing(0.3, (0.7, 0.5, -6.0)),  # the statistics are nearer, the answers far worse
        measured_preprocessing(None, (0.7, 0.72, 2.0)),
    ],
)
def test_preprocessing_that_hardly_differs_is_fine(measured: dict[str, Any]) -> None:
    assert diagnose_records(run_records(preprocessing=measured)).findings == ()


def test_causes_explain_what_follows_from_them() -> None:
    given = {"samples": WORSE, "resolved": HIGH_RATE, "lines": journal(dead={"stage3": (0.0, 0.9)}, val=[(1.0, 0.5)] * 6)}
    found = diagnose_records(run_records(**given))
    causes = {finding.code: finding.caused_by for finding in found.problems}
    assert causes.pop("learning_rate_high") is None
    assert {"dead_units", "degradation"} <= set(causes)
    assert None not in causes.values()
    assert "more finding" in found.sentence


# ── the document, and folders ─────────────────────────────────────────────────────────────────────


def test_the_document_survives_json() -> None:
    found = diagnose_records(run_records(samples=WORSE, resolved=HIGH_RATE))
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert Diagnosis.from_dict(json.loads(text)) == found


def test_a_run_s_folder_gives_the_same_records(tmp_path: Path) -> None:
    records = run_records(preprocessing=measured_preprocessing(1.2), neighbours=neighbours(60), samples=WORSE)
    run = write_run(tmp_path / "some-run", records)
    assert diagnose(run.root) == diagnose_records(records)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"has no resolved\.json"):
        diagnose(tmp_path)


def test_a_run_that_failed_at_once_has_nothing_to_look_at(tmp_path: Path) -> None:
    (tmp_path / "error.json").write_text('{"message": "no such folder"}')
    found = diagnose_records(RunRecords.read(tmp_path))
    assert found.findings == ()
    assert len(found.not_checked) + len(found.clear) == len(CHECKS)


# ── statistics ────────────────────────────────────────────────────────────────────────────────────


def test_confidence_is_a_half_at_the_threshold_and_never_certain() -> None:
    assert [confidence(strength) for strength in (0.0, 1.0, 9.0, 1e9, -3.0)] == [0.0, 0.5, 0.9, 0.99, 0.0]


def test_the_binomial_tail_is_scipy_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    for n, k, p in [(10, 3, 0.01), (200, 5, 0.01), (1000, 200, 0.1)]:
        assert log_binomial_tail(n, k, p) == pytest.approx(stats.binom.logsf(k - 1, n, p), rel=1e-9)
    assert log_binomial_tail(10, 0, 0.5) == 0.0


def test_the_slope_is_scipy_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(size=12) - 0.1 * np.arange(12)
    expected = stats.linregress(np.arange(12), values)
    found = slope(values)
    assert (found.value, found.error) == pytest.approx((expected.slope, expected.stderr))
    assert math.isinf(slope(values[:2]).error)


def test_pairs_are_formed_by_image() -> None:
    first, second = answered(10, 1.0), answered(10, 1.0).take([9, 3, 5])
    values = np.arange(10.0)
    found = paired(first, second, values, np.array([10.0, 4.0, 6.0]))
    assert found is not None
    assert (found.value, found.n) == (1.0, 3)
    assert paired(first, answered(10, 1.0, prefix="other"), values, values) is None
    assert share(0, 20).error > 0
    assert mean_of(np.array([1.0, 3.0])).error == pytest.approx(1.0)


def test_a_cross_validation_is_diagnosed_with_the_answers_and_the_copies_of_its_folds(tmp_path: Path) -> None:
    study = RunDir(tmp_path / "study").create()
    write_run(study.child("final").root, run_records(held_out={}, neighbours=[]))
    write_json(study.study, {"kind": "folds", "children": ["final"], "kept": None})
    assert diagnose(study.child("final").root).finding("leakage") is None
    with pytest.raises(NotFound):
        diagnose(study.root)  # undecided, so there is no run to diagnose
    write_json(study.study, {"kind": "folds", "children": ["final"], "kept": "final"})
    pooled = answered(200, 0.92, seed=1, prefix="val")
    tables.write(study.predictions_of("cv"), replace(pooled, split="cv"))
    fold = study.child("fold-1").create()
    fold.measurements.mkdir(exist_ok=True)
    rows = [(split, f"val-{number}", "ash", f"train-{number}", "ash", 0.8) for number in range(200) for split in ("val", "test")]
    with open(fold.neighbours, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([NEIGHBOURS_COLUMNS, *rows])
    pool_neighbours(study, [fold])
    copies = [{"split": "cv", "file": f"val-{number}", "copy_of": "train-0", "score": 0.99} for number in range(20)]
    write_json(study.near_copies, {"candidates": 20, "compared": 20, "copies": copies})
    found = diagnose(study.root).finding("leakage")
    assert found is not None
    assert found.sentence.startswith("20 of 200 cv images have a near duplicate among the training images")
    assert {one.code for one in diagnose(study.root).clear} >= {"collapsed_classes"}, "the answers of the folds are looked at"


def test_a_label_that_is_never_given_is_a_problem_with_its_number_of_images() -> None:
    targets = np.zeros((40, 3), np.uint8)
    targets[:12, 0], targets[5:30, 1], targets[:4, 2] = 1, 1, 1
    logits = np.where(targets, 3.0, -3.0).astype(np.float32)
    ids, digests = tuple(map(str, range(40))), np.zeros((40, 32), np.uint8)
    healthy = Predictions("val", "multilabel", ("a", "b", "c"), ids, digests, targets, logits)
    multilabel = {**resolved(), "task": "multilabel"}

    def of(table: Predictions) -> Diagnosis:
        return diagnose_records(run_records(resolved=multilabel, samples={}, lines=[], neighbours=[], held_out={"val": table}))

    assert of(healthy).finding("collapsed_classes") is None
    logits[:, [0, 2]] = -3.0
    found = of(replace(healthy, logits=logits)).finding("collapsed_classes")
    assert found is not None
    assert found.severity == "problem"
    assert "gives no val image the label a, although 12 of 40 have it" in found.sentence, "four images of c are too few"
    never = of(replace(healthy, logits=np.full_like(logits, -3.0))).finding("collapsed_classes")
    assert never is not None
    assert "a, b, although 12, 25 of 40 have them" in never.sentence
