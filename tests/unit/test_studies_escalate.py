"""Method auto goes deeper while that pays, keeps the best, and reports what it carried out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from answers import table
from tiny_runs import carry_out_at, tiny_spec, write_stripes

from finetune.bundle.manifest import read_manifest
from finetune.evaluation import predictions as tables
from finetune.evaluation.predictions import read
from finetune.runs.options import RunOptions
from finetune.runs.outcome import Outcome
from finetune.runs.resolve import Resolved
from finetune.spec import parse_spec
from finetune.storage.files import read_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.studies.escalate import Escalation, escalation

N = 200  # validation images


def study_in(folder: Path, n_stages: int = 4) -> Escalation:
    return escalation(
        parse_spec({"training_file": "x", "method": "auto", "seed": 7}), n_stages, RunOptions(judged=("val",)), RunDir(folder)
    )


def finish(study: Escalation, name: str, n_right: int) -> None:
    """Leave the answers of a candidate that gets the first `n_right` of N images right."""
    targets = np.arange(N) % 2
    given = np.where(np.arange(N) < n_right, targets, 1 - targets)
    tables.write(study.run.child(name).predictions_of("val"), table(np.eye(2, dtype=np.float32)[given], targets))


@pytest.mark.parametrize(
    ("counts", "tried", "kept"),
    [
        ({"linear_probe": 100, "partial": 101, "full": 180}, ["linear_probe", "partial"], "partial"),
        ({"linear_probe": 100, "partial": 90, "full": 180}, ["linear_probe", "partial"], "linear_probe"),
        ({"linear_probe": 100, "partial": 130, "full": 180}, ["linear_probe", "partial", "full"], "full"),
        ({"linear_probe": 100, "partial": 130, "full": 120}, ["linear_probe", "partial", "full"], "partial"),
    ],
)
def test_it_goes_deeper_while_that_pays_and_keeps_the_best(
    tmp_path: Path, counts: dict[str, int], tried: list[str], kept: str
) -> None:
    study = study_in(tmp_path)
    done: dict[str, Any] = {}
    while children := study.next_children(done):
        (child,) = children
        assert study.next_children(done) == children, "asked again, it gives the same"
        finish(study, child.name, counts[child.name])
        done[child.name] = SimpleNamespace()
    assert list(done) == tried
    assert study.kept(len(done)) == kept
    stopped = "so no more stages are trained" in " ".join(study.reasons(len(done)))
    assert stopped == (not study.gains(len(done))[-1][1].pays)


def test_candidates_are_the_request_with_one_method_each(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    assert [child.spec.method.type for child in study.candidates] == ["linear_probe", "partial", "full"]
    assert {child.spec.seed for child in study.candidates} == {7}
    assert {child.options for child in study.candidates} == {RunOptions(goal="judged", judged=("val",))}
    assert [child.name for child in study_in(tmp_path, n_stages=1).candidates] == ["linear_probe", "full"]


# ── carried out ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def escalated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, RunDir]:
    home = tmp_path_factory.mktemp("home")
    run = RunDir(home / "runs" / "auto")
    spec = tiny_spec(
        write_stripes(home / "pictures", 60), method="auto", hyperparameters={"n_epochs": 1, "batch_size": 8}, suffix="stripes"
    )
    return carry_out_at(home, spec, run), run


@pytest.mark.usefixtures("one_torch_thread")
def test_what_is_reported_is_what_was_carried_out(escalated: tuple[Outcome, RunDir]) -> None:
    outcome, run = escalated
    study = read_json(run.study)
    kept = study["kept"]
    assert kept == "linear_probe", "a solved head on these stripes leaves little to gain; else this test proves less"
    assert (outcome.method, outcome.carried_out) == ("auto", kept)
    resolved = read_json(run.resolved)
    assert resolved["spec"]["method"]["type"] == "auto", "the request as it was made"
    assert resolved["study"] == study
    own = read_json(run.child(kept).resolved)
    for key in ("recipe", "values", "sources", "backbone", "augmentation"):
        assert resolved[key] == own[key]
    assert not any(stage["trains"] for stage in resolved["backbone"]["stages"])
    assert read_manifest(outcome.bundle).method["type"] == kept
    assert f"stripes: {kept} on test_efficientnet" in run.report.read_text()
    assert outcome.cost["trainable_parameters"] < 0.05 * outcome.cost["total_parameters"]
    assert Resolved.from_dict(own).recipe.method == kept


@pytest.mark.usefixtures("one_torch_thread")
def test_figures_are_those_of_the_kept_candidate_and_costs_those_of_all(escalated: tuple[Outcome, RunDir]) -> None:
    outcome, run = escalated
    children = [Outcome.read(run.child(name)) for name in read_json(run.study)["children"]]
    assert len(children) >= 2
    kept = next(child for child in children if child.carried_out == outcome.carried_out)
    assert {key: outcome.metrics[key] for key in kept.metrics} == kept.metrics
    features = [child.cost["feature_seconds"] for child in children]
    own = [child.cost["train_seconds"] - child.cost["feature_seconds"] for child in children]
    assert min(features) > 0
    assert outcome.cost["feature_seconds"] == max(features), "they share their features"
    assert outcome.cost["train_seconds"] == pytest.approx(sum(own) + max(features))
    for split in ("val", "test"):
        assert (read(run.predictions_of(split)).logits == read(run.child(kept.carried_out).predictions_of(split)).logits).all()
    assert [line["kind"] for line in read_lines(run.events)].count("compared") == len(children) - 1
    assert outcome.summary.startswith("auto: linear_probe")
    assert "no more stages are trained" in outcome.summary


@pytest.mark.usefixtures("one_torch_thread")
def test_candidates_are_judged_on_the_same_images_and_only_the_kept_one_is_exported(escalated: tuple[Outcome, RunDir]) -> None:
    _, run = escalated
    children = [run.child(name) for name in read_json(run.study)["children"]]
    assert len({child.split.read_bytes() for child in (run, *children)}) == 1
    assert len({read(child.predictions_of("val")).ids for child in children}) == 1
    assert [child.root.name for child in children if child.bundle.exists()] == [read_json(run.study)["kept"]]
