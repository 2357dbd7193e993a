"""Read from a run's folder what a tracker displays: params, figures, datasets and files.

Everything comes from files that a run writes in any case, so it can be read during the run or long afterwards, without importing
training libraries. Independent of any tracker.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune.comparison_spec import parse_comparison
from finetune.naming import dataset_name, without_archive_ending
from finetune.spec import JobSpec, parse_spec
from finetune.storage.files import read_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.tasks import TASKS, task_named
from finetune.tasks.leading import recorded_leading

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

ARM_TAG = "finetune.arm"  # the arm of a comparison's run; its runs differ in the seed only
FOLDS, COMPARISON = "folds", "comparison"  # kinds of studies
FILES = (
    "report.html", "figures", "predictions", "evaluation.json", "comparison.json", "study.json", "resolved.json", "request.json",
    "spec.yaml", "split.csv",
)  # fmt: skip
"""The files and folders of a run that are mirrored. The bundle is mirrored as a model instead."""

SPLITS_BY_WEIGHT = ("cv", "test", "val")  # val comes last, since the epoch was chosen on it
CONTEXTS = {"train": "training", "val": "validation", "test": "test"}

_PLAIN_NAMES = {"augmentation.policy": "augmentation"}  # else the last part of a field's path
LONGEST_NAME = 40

_OF_SEED = re.compile(r"(.+)-seed(\d+)")  # names of a comparison's runs
_UPLOAD = re.compile(r"file-[0-9a-z]{26}")


@dataclass(frozen=True)
class SplitView:
    """The images of one split, as an input of the run."""

    name: str
    split: str
    context: str  # training, validation, test
    digest: str  # of the manifest of the whole dataset, hexadecimal sha256
    source: str
    counts: Mapping[str, int]  # images by class

    @property
    def n(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class ModelView:
    """The bundle that a run wrote, and its name and version in the registry."""

    bundle: Path
    name: str
    version: str | None  # in the models folder; None: not registered


@dataclass(frozen=True)
class RunView:
    """A run or study as a tracker displays it. Everything may be incomplete while the run is in progress."""

    name: str
    study: str | None  # the kind of study; None for a run
    status: Status
    started_at: float  # Unix seconds
    ended_at: float | None
    params: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    splits: tuple[SplitView, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)  # final values under ``split/name``
    costs: Mapping[str, float] = field(default_factory=dict)  # names carry their unit
    headline: str | None = None  # key in `figures` of the metric to report first
    expected_headline: str | None = None  # the headline of a run without figures yet
    model: ModelView | None = None


def read_view(run: RunDir, *, alive: bool, ended_as: Status | None = None, experiment: str = "") -> RunView:
    """Read the view from a run's folder.

    Args:
        alive: whether a process is still working on the run.
        ended_as: the final status of a run whose process died before it could record it.
        experiment: the name of the data if it is an upload, which has only an id.
    """
    spec, resolved, outcome = _spec(run), read_object(run.resolved), read_object(run.outcome)
    comparison = read_object(run.comparison)
    study = COMPARISON if comparison else read_object(run.study).get("kind")
    events = read_lines(run.events)
    status = _status(run, bool(outcome or comparison), events, alive=alive, ended_as=ended_as)
    times = [float(event["at"]) for event in events]
    ended_at = None if status == "RUNNING" else _ended_at(run, events)
    costs = outcome.get("cost") or comparison.get("cost") or read_object(run.cost)
    figures = _chosen_figures(comparison) if comparison else outcome.get("metrics", {})
    figures = {key: float(figures[key]) for key in sorted(figures, key=_weight)}
    return RunView(
        name=_name(run, spec, comparison),
        study=study,
        status=status,
        started_at=min([*times, (ended_at or time.time()) - float(costs.get("wall_seconds", 0.0))]),
        ended_at=ended_at,
        params=dict(_params(spec, resolved, outcome)) if study != COMPARISON else _shared_params(run) if comparison else {},
        tags=dict(_tags(run, spec, resolved, outcome, study)),
        splits=tuple(_splits(resolved or _resolved_of_child(run), experiment)),
        figures=figures,
        costs={key: float(value) for key, value in costs.items()},
        headline=_headline(figures, comparison),
        expected_headline=_expected_headline(run, resolved, study),
        model=_model(run, resolved, outcome),
    )


def children(run: RunDir) -> list[RunDir]:
    """Return the study's children that have begun: ended ones in the order in which they ended, then those in progress."""
    if not run.study.exists():
        return []
    ended = [run.child(name) for name in read_object(run.study).get("children", ())]
    known = {child.root for child in ended}
    begun = sorted(folder for folder in (run.root / "runs").glob("*") if (folder / "spec.yaml").exists() and folder not in known)
    return [*ended, *(RunDir(folder) for folder in begun)]


def top_of(run: RunDir) -> RunDir:
    """Return the outermost study that a run belongs to, or the run itself."""
    return run.outermost


def files_of(run: RunDir) -> list[Path]:
    """Return the existing files of a run that are to be mirrored."""
    paths = [run.root / name for name in FILES]
    inside = (sorted(path.rglob("*")) if path.is_dir() else [path] for path in paths)
    return [file for files in inside for file in files if file.is_file() and not file.name.startswith(".")]


def experiment_name(spec: JobSpec) -> str:
    """Return the experiment's name for a spec: the name of the dataset or, for an upload, that of the model if it has one."""
    return _gathered_under(dataset_name(spec.training_file), spec.suffix)


def _gathered_under(name: str, suffix: str | None, dataset: str = "") -> str:
    if _UPLOAD.fullmatch(name):
        return suffix or name
    return without_archive_ending(name).strip(".") or dataset or suffix or "images"


def experiment_of(run: RunDir) -> str:
    """Return the name of a run's experiment from its folder, for a run without a recorded one."""
    dataset = read_object(run.resolved).get("dataset") or {"name": read_object(run.comparison).get("dataset")}
    spec = _spec(run)
    given = str(spec.get("training_file") or dataset["name"] or "images")
    return _gathered_under(dataset_name(given), spec.get("suffix"), str(dataset["name"] or ""))


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no file."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}


def _spec(run: RunDir) -> dict[str, Any]:
    """Return the request of a run. That of a comparison is a job spec with additional keys."""
    if run.request.exists():
        return read_object(run.request)
    try:
        found = yaml.safe_load(run.spec.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}


def _status(run: RunDir, complete: bool, events: list[dict[str, Any]], *, alive: bool, ended_as: Status | None) -> Status:
    if complete:
        return "FINISHED"
    if alive:
        return "RUNNING"
    if ended_as is not None:
        return ended_as
    return "FAILED" if run.error.exists() or (events and events[-1].get("kind") == "failed") else "KILLED"


def _ended_at(run: RunDir, events: list[dict[str, Any]]) -> float:
    """Return when a run ended; a study's child that is exported at the end of the study ended before the export."""
    ends = [float(event["at"]) for event in events if event.get("kind") in ("finished", "succeeded")]
    if run.parent is not None and ends:
        return ends[0]
    return max((float(event["at"]) for event in events), default=time.time())


def _name(run: RunDir, spec: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    """Return a short name that distinguishes runs on one dataset: the method, and settings that differ from the defaults."""
    if run.parent is not None:
        return _OF_SEED.sub(r"\1, seed \2", run.name)
    if run.request.exists() or comparison:
        arms = [arm["name"] for arm in comparison.get("arms", ())] or _asked_arms(spec)
        text = " vs ".join(arms)
        return text if arms and len(text) <= LONGEST_NAME else f"comparison of {len(arms) or 'several'} arms"
    if not spec:
        return "run"
    usual = parse_spec({"training_file": "-"}).model_dump(mode="json")
    method, folds = spec["method"], spec["data"]["folds"]
    parts = [str(method["type"])]
    if method.get("train"):
        parts[0] += f" {'+'.join(map(str, method['train']))}"
    elif method.get("stages") not in (None, 1):
        parts[0] += f" {method['stages']} stages"
    if spec["model"]["backbone"] != usual["model"]["backbone"]:
        parts.append(str(spec["model"]["backbone"]))
    if folds is not None:
        parts.append(f"{folds} folds")
    if spec["seed"] != usual["seed"]:
        parts.append(f"seed {spec['seed']}")
    return ", ".join(parts)


def _asked_arms(request: Mapping[str, Any]) -> list[str]:
    """Return the names of the arms in a comparison's request; empty if it compares finished runs."""
    return [arm.name for arm in parse_comparison(request).arms] if "training_file" in request else []


def _chosen_figures(comparison: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of the arm that a comparison chose, as means over its seeds."""
    chosen = comparison["verdict"]["choose"]
    figures: dict[str, float] = {}
    for key, found in next(arm for arm in comparison["arms"] if arm["name"] == chosen)["metrics"].items():
        figures[key] = found["value"]
        figures[f"{key.partition('/')[0]}/n"] = found["n"]
        if found["low"] is not None:
            figures |= {f"{key}_low": found["low"], f"{key}_high": found["high"]}
    return figures


def _resolved_of_child(run: RunDir) -> dict[str, Any]:
    """Return the ``resolved.json`` of a study's first child, which has the same data as the study."""
    return next((found for child in children(run) if (found := read_object(child.resolved))), {})


def _params(
    spec: Mapping[str, Any], resolved: Mapping[str, Any], outcome: Mapping[str, Any]
) -> Iterator[tuple[str, str | int | float | bool]]:
    """Yield the resolved settings under plain names. Undecided ones are left out, since a param cannot be changed later."""
    if not resolved:
        return
    recipe, asked = resolved["recipe"], resolved["spec"]
    stages = resolved["backbone"]["stages"]
    trained = [stage["name"] for stage in stages if stage["trains"]]
    yield "method", recipe["method"]
    yield "trains", "everything" if len(trained) == len(stages) else ", ".join(["head", *trained])
    values = {**resolved["values"], "hyperparameters.l2": outcome.get("choices", {}).get("l2") or recipe["l2"]}
    if asked["data"]["folds"] is not None:
        values["data.folds"] = asked["data"]["folds"]
    for path, value in values.items():
        if value is not None:
            name = _PLAIN_NAMES.get(path, path.rpartition(".")[2])
            yield name, str(value).rpartition("/")[2] if name == "weights" else value
    yield "seed", asked["seed"]
    yield "split_seed", asked["data"]["split_seed"]
    if outcome:
        yield "n_train", outcome["n_train"]


def _shared_params(run: RunDir) -> dict[str, str | int | float | bool]:
    """Return the params that are equal in all runs of a comparison."""
    found = [read_view(child, alive=True).params for child in children(run)]
    shared = {key: value for key, value in (found[0] if found else {}).items() if all(one.get(key) == value for one in found)}
    return shared if all(found) else {}


def _tags(
    run: RunDir, spec: Mapping[str, Any], resolved: Mapping[str, Any], outcome: Mapping[str, Any], study: str | None
) -> Iterator[tuple[str, str]]:
    for key, value in (spec.get("metadata") or {}).items():
        if not str(key).startswith(("mlflow.", "finetune.")):
            yield str(key), str(value)
    yield "finetune.run", run.root.relative_to(top_of(run).root.parent).as_posix()
    if run.parent is not None and (of_seed := _OF_SEED.fullmatch(run.name)):
        yield ARM_TAG, of_seed[1]
    if study is not None:
        yield "finetune.study", study
    if resolved:
        yield "finetune.dataset", resolved["dataset"]["digest"]
    if outcome.get("model"):
        yield "finetune.model", f"{outcome['model']}@{outcome['version']}"


def _splits(resolved: Mapping[str, Any], experiment: str) -> Iterator[SplitView]:
    dataset = resolved.get("dataset", {})
    name = dataset.get("name", "")
    name = (experiment or name) if _UPLOAD.fullmatch(name) else name
    for split, counts in dataset.get("counts", {}).items():
        if split in CONTEXTS and sum(counts.values()):
            yield SplitView(f"{name} {split}", split, CONTEXTS[split], dataset["digest"], dataset["root"], counts)


def _weight(key: str) -> int:
    """Return the sort key of a figure by its split, most independent images first."""
    split = key.partition("/")[0]
    return SPLITS_BY_WEIGHT.index(split) if split in SPLITS_BY_WEIGHT else len(SPLITS_BY_WEIGHT)


def _headline(figures: Mapping[str, float], comparison: Mapping[str, Any]) -> str | None:
    """Return the key of the figure to report first, on the most independent split; for a comparison, its recorded key."""
    if comparison:
        return str(comparison.get("leading") or comparison["headline"])
    for split in SPLITS_BY_WEIGHT:
        for task in TASKS:
            if f"{split}/{task.headline.key}_low" in figures:
                return f"{split}/{recorded_leading(task, figures, split).key}"
    return None


def _expected_headline(run: RunDir, resolved: Mapping[str, Any], study: str | None) -> str | None:
    """Return the key of the headline that a run will have; for a study, derived from its first child."""
    if study is not None:
        begun = children(run)
        found = (
            _expected_headline(begun[0], read_object(begun[0].resolved), read_object(begun[0].study).get("kind"))
            if begun
            else None
        )
        return None if found is None else f"cv/{found.partition('/')[2]}" if study == FOLDS else found
    if not resolved:
        return None
    evaluated = read_object(run.options).get("judged", SPLITS_BY_WEIGHT)
    split = next((split for split in SPLITS_BY_WEIGHT if split in evaluated and resolved["dataset"]["sizes"].get(split)), None)
    if split is None:
        return None
    class_sizes = Counter[str]()
    for counts in resolved["dataset"].get("counts", {}).values():
        class_sizes.update(counts)
    return f"{split}/{task_named(resolved['task']).leading(list(class_sizes.values())).key}"


def _model(run: RunDir, resolved: Mapping[str, Any], outcome: Mapping[str, Any]) -> ModelView | None:
    if not outcome.get("bundle") or not resolved:
        return None
    inside = os.path.relpath(outcome["bundle"], outcome["run"])  # the folder may have been moved since
    return ModelView(run.root / inside, outcome.get("model") or resolved["model_name"], outcome.get("version"))
