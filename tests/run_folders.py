"""Run folders as runs leave them, written in milliseconds: real documents of a resolved request and an outcome, no training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from folders import local_sample
from tiny_bundle import write_tiny_bundle

from finetune.bundle.preprocess import Preprocess
from finetune.bundle.registry import Registry
from finetune.data.dataset import Dataset
from finetune.data.split import split_dataset
from finetune.events import Finished, Planned, Registered
from finetune.model.facts import BackboneFacts, StageFacts
from finetune.runs.outcome import Outcome
from finetune.runs.resolve import Resolved, resolve
from finetune.spec import JobSpec, parse_spec
from finetune.storage.files import write_json
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.training.compute import Compute

CLASSES = ("rose", "tulip", "iris")
N_IMAGES = 90
BACKBONE = BackboneFacts(
    name="resnet18",
    stages=tuple(StageFacts(i, name, 100 * (i + 1), (8, 4, 4)) for i, name in enumerate(["stem", "layer1", "layer2", "layer3"])),
    n_parameters=1000,
    n_features=16,
    has_batch_norm=True,
    resizable=True,
    weights={"source": "hub", "identifier": "timm/resnet18.a1_in1k", "sha256": "0" * 64, "license": "apache-2.0"},
    preprocess=Preprocess((224, 224), "crop", 0.875, "bicubic", (124, 116, 104), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
    cam_kind="linear",
    cam_reason="",
)
COST = {
    "wall_seconds": 20.0,
    "cpu_seconds": 30.0,
    "peak_memory_bytes": 2.0**30,
    "train_seconds": 12.5,
    "train_cpu_seconds": 20.0,
    "feature_seconds": 5.0,
    "feature_cpu_seconds": 9.0,
    "trainable_parameters": 51.0,
    "total_parameters": 1051.0,
}


def spec_of(method: Any = "full", **given: Any) -> JobSpec:
    return parse_spec({"training_file": "./flowers", "model": {"backbone": "resnet18"}, "method": method, **given})


def resolved_of(spec: JobSpec, name: str = "flowers") -> Resolved:
    digests = [hashlib.sha256(f"{name} {number}".encode()).hexdigest() for number in range(N_IMAGES)]
    samples = tuple(
        local_sample(Path(f"{number}.jpg"), number % len(CLASSES), sha256=digest, size_px=(300, 200))
        for number, digest in enumerate(digests)
    )
    dataset = split_dataset(Dataset(name, f"/data/{name}", CLASSES, samples))
    return resolve(spec, dataset, BACKBONE, Compute("cpu", "auto", 2))


def figures(top1: float, splits: tuple[str, ...] = ("test", "val"), n: int = 14) -> dict[str, float]:
    """What a run is judged to be, as `RunEvaluation.metrics` gives it."""
    found: dict[str, float] = {}
    for split in reversed(splits):  # as runs write them: val first
        found |= {f"{split}/top1": top1, f"{split}/macro_f1": top1 - 0.01, f"{split}/loss": 1.0 - top1}
        found |= {f"{split}/top1_low": top1 - 0.1, f"{split}/top1_high": top1 + 0.1, f"{split}/n": float(n)}
    return found


def begin_run(run: RunDir, spec: JobSpec, *, dataset: str = "flowers") -> Resolved:
    """What a run has written when it begins to train."""
    run.create()
    run.spec.write_text(spec.to_yaml())
    resolved = resolved_of(spec, dataset)
    write_json(run.resolved, resolved.to_dict())
    run.split.write_text("path,label,split\n0.jpg,rose,train\n")
    sizes = dict(resolved.dataset.sizes)
    run.record(Planned(f"{len(CLASSES)} classes", sizes, 0))
    return resolved


def train_steps(run: RunDir, steps: range, *, speed: float = 100.0) -> None:
    """What an epoch of each step writes; the figures depend on the step alone, but for the speed."""
    for step in steps:
        values = {"train/loss": 1 / (step + 1), "train/lr": 0.1, "train/images_per_second": speed + step, "val/top1": step / 10}
        run.metric(step, {**values, "train/grad_norm/stage0": 0.5}, epoch=float(step))


def end_run(run: RunDir, resolved: Resolved, *, top1: float = 0.9, goal: str = "judged", **changes: Any) -> Outcome:
    """What a run writes at its end; with the goal ``exported`` also a bundle."""
    outcome = Outcome(
        run=run.root,
        method=resolved.spec.method.type,
        carried_out=resolved.recipe.method,
        goal=goal,
        metrics=figures(top1),
        cost=dict(COST),
        summary=f"{resolved.recipe.method}: done",
        classes=CLASSES,
        n_train=resolved.dataset.sizes["train"],
        warnings=(),
        quarantined=0,
        choices={"l2": 10.0},
    )
    if goal != "judged":
        write_tiny_bundle(run.bundle, seed=round(1000 * top1), metrics=outcome.metrics)
        cost = {**COST, "bundle_bytes": 2.0**20, "latency_seconds": 0.0015}
        outcome = replace(outcome, bundle=run.bundle, cost=cost)
    outcome = replace(outcome, **changes)
    run.figures.mkdir(exist_ok=True)
    (run.figures / "confusion.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    run.report.write_text(f"<html>{top1}</html>")
    run.metric(9, {**outcome.metrics, **{f"cost/{key}": value for key, value in outcome.cost.items()}})
    outcome.write(run)
    if outcome.model is None:
        run.record(Finished(outcome.summary, outcome.metrics))
    else:
        run.record(Registered(f"{outcome.model} is registered", outcome.model, str(outcome.version), outcome.metrics))
    return outcome


def whole_run(run: RunDir, method: Any = "full", *, top1: float = 0.9, steps: int = 3, **given: Any) -> Outcome:
    """A finished run of `steps` epochs that exported nothing."""
    resolved = begin_run(run, spec_of(method, **given))
    train_steps(run, range(steps))
    return end_run(run, resolved, top1=top1)


def registered_run(run: RunDir, workspace: Workspace, *, name: str = "flowers", top1: float = 0.9) -> Outcome:
    """A finished run whose bundle is a version in the workspace's registry."""
    resolved = begin_run(run, spec_of(suffix=name))
    train_steps(run, range(3))
    outcome = end_run(run, resolved, top1=top1, goal="exported")
    assert outcome.bundle is not None
    version = Registry(workspace.models).register(outcome.bundle, name, once=True)
    return end_run(run, resolved, top1=top1, goal="exported", model=name, version=version.version)


def whole_study(run: RunDir, kind: str = "auto", methods: Mapping[str, float] = {"linear_probe": 0.8, "full": 0.9}) -> None:
    """A finished study of one run for each method, with its top-1 accuracy; the last is kept."""
    run.create()
    write_json(run.study, {"kind": kind, "children": [], "kept": None})
    spec = spec_of("auto")
    run.spec.write_text(spec.to_yaml())
    for method, top1 in methods.items():
        whole_run(run.child(method), method, top1=top1)
    kept = list(methods)[-1]
    write_json(run.study, {"kind": kind, "children": list(methods), "kept": kept})
    resolved = resolved_of(spec_of(kept))
    write_json(run.resolved, {**resolved.to_dict(), "spec": spec.model_dump(mode="json")})
    run.metrics.write_bytes(run.child(kept).metrics.read_bytes())  # as a study does
    end_run(run, resolved, top1=methods[kept], method="auto")


def whole_comparison(run: RunDir, arms: Mapping[str, float] = {"linear_probe": 0.8, "full": 0.9}, *, seeds: int = 2) -> None:
    """A finished comparison of one arm for each method."""
    run.create()
    spec = spec_of("linear_probe")
    write_json(run.request, {**spec.model_dump(mode="json"), "methods": list(arms), "seeds": seeds})
    names = {arm: [f"{arm.replace('_', '-')}-seed{number}" for number in range(seeds)] for arm in arms}
    for number in range(seeds):
        for arm, top1 in arms.items():
            whole_run(run.child(names[arm][number]), arm, top1=top1 + number / 100, seed=number)
    write_json(
        run.study, {"kind": "comparison", "children": [n for found in names.values() for n in found], "kept": names["full"][0]}
    )
    listed = [
        {
            "name": arm,
            "runs": [str(run.child(name).root) for name in names[arm]],
            "metrics": {
                "test/top1": {"value": top1, "low": top1 - 0.1, "high": top1 + 0.1, "n": 14, "sd": 0.01},
                "test/loss": {"value": 1 - top1, "low": None, "high": None, "n": 14, "sd": 0.02},
            },
            "cost": {"train_seconds": 12.5, "bundle_bytes": 2.0**20},
        }
        for arm, top1 in arms.items()
    ]
    pair = {"a": "full", "b": "linear_probe", "metric": "test/top1", "difference": 0.1, "low": 0.02, "high": 0.18}
    run.report.write_text("<html>the page</html>")
    write_json(
        run.comparison,
        {
            "object": "comparison",
            "id": run.root.name,
            "dataset": "flowers",
            "split": "test",
            "headline": "test/top1",
            "leading": "test/top1",
            "arms": listed,
            "pairs": [{**pair, "p_value": 0.02, "p_adjusted": 0.02}, {**pair, "metric": "test/loss", "p_adjusted": None}],
            "verdict": {"choose": "full", "outcome": "better", "sentence": "full is better than linear_probe by 10 points."},
            "cost": {"wall_seconds": 90.0},
        },
    )
