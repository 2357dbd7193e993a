"""The Python API: train, compare, check, suggest and load, as functions that return objects with the results.

    import finetune

    run = finetune.train("photos", method="partial")
    run.metrics["test/top1"], run.predict("some.jpg").label
    model = finetune.load("photos@champion")

The command line calls the same functions underneath; keyword arguments are fields of the job spec (docs/spec.md).
``import finetune`` imports this module lazily.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.advice import for_python, worded_for
from finetune.api.arguments import explains_keywords
from finetune.api.model import Model
from finetune.api.run import Run
from finetune.bundle.calibration import CertaintyOptions
from finetune.bundle.registry import Registry
from finetune.errors import InvalidInput
from finetune.progress_bars import progress_bars
from finetune.spec import JobSpec, merged_mapping, parse_spec
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import tracked_as
from finetune.tracking.process import followed
from finetune.tracking.tracker import choose
from finetune.tracking.view import experiment_name

if TYPE_CHECKING:
    from finetune.labelling.suggestion import Suggestions
    from finetune.studies.compare.result import Comparison
    from finetune.studies.plan import Plan

__all__ = ["CertaintyOptions", "Model", "Run", "check", "compare", "load", "suggest", "train"]


@explains_keywords
@worded_for(for_python)
def train(
    data: str | Path,
    *,
    method: str | None = None,
    model: str | None = None,
    epochs: int | None = None,
    folds: int | None = None,
    seed: int | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    workspace: str | Path | None = None,
    trackers: Sequence[str] | None = None,
    experiment: str | None = None,
    progress: bool = True,
) -> Run:
    """Fine-tune, evaluate, export and register a model; the same call after an interruption resumes the run.

    Args:
        data: a folder of class folders, or data in any other supported format.
        method: linear_probe (the default), partial, full, gradual or auto.
        model: a timm name.
        folds: number of folds for cross-validation; None for a single split.
        name: of the registered model; by default derived from the name of the data.
        settings: any other fields of the job spec, such as ``{"hyperparameters.batch_size": 16}``.
        run_dir: the run folder; by default a new one in the workspace.
        workspace: by default the folder that ``FINETUNE_HOME`` names, else ``.finetune`` in the current folder.
        trackers: ``mlflow`` (the default if installed), ``tensorboard``, or ``()`` for none.
        experiment: name of the experiment in the trackers; by default the name of the data.
        progress: show progress bars.

    Raises:
        FinetuneError: the request or the data is invalid, or training failed; the message says what to do.
    """
    from finetune.runs.shared import Shared
    from finetune.studies.carry_out import fine_tune

    spec = _spec(data, method, model, epochs, folds, seed, name, settings)
    place = _workspace(workspace)
    gathered = followed(choose(trackers), place, experiment or experiment_name(spec))
    with gathered as begun, progress_bars(shown=progress) as update:
        outcome = fine_tune(spec, Shared.of(place), update, None if run_dir is None else Path(run_dir), begun)
    return Run(outcome.run)


@explains_keywords
@worded_for(for_python)
def compare(
    what: str | Path | Sequence[Run | str | Path],
    *,
    methods: Sequence[str] = (),
    models: Sequence[str] = (),
    arms: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: int = 3,
    folds: int | None = None,
    margin: float = 0.01,
    budget_seconds: float | None = None,
    settings: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    slots: int = 1,
    workspace: str | Path | None = None,
    trackers: Sequence[str] | None = None,
    experiment: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Train in several ways on the same images and recommend one, by paired statistics and cost.

    Args:
        what: the data; or finished runs, which are compared without training, on the images that none of them was trained on.
        methods: one arm per method (by default linear_probe, partial and full).
        models: one arm per backbone and method.
        arms: arms by their settings, such as ``{"strong": {"augmentation": "strong"}}``.
        seeds: number of runs per arm.
        margin: the largest difference of the headline metric that does not matter.
        budget_seconds: approximate time limit; the cheapest arms are run first.
        settings: fields of the job spec that all arms share.
        slots: number of runs to execute in parallel, each in its own process.
        trackers, experiment: as for `train`.

    Raises:
        FinetuneError: the request or the data is invalid, a run failed, or the runs have no image in common; the message says
            what to do.
    """
    from finetune.comparison_spec import parse_comparison
    from finetune.executors.slots import Slots
    from finetune.runs.shared import Shared
    from finetune.studies.compare import compare as run_comparison
    from finetune.studies.compare import compare_runs

    out = None if run_dir is None else Path(run_dir)
    if not isinstance(what, str | Path):
        folders = [run.folder if isinstance(run, Run) else Path(run) for run in what]
        place = _workspace(workspace)
        found = compare_runs(folders, place, margin, out)
        with followed(choose(trackers), place, experiment or found.dataset) as begun:
            begun(RunDir(found.folder))
        return replace(found, mlflow_run_id=tracked_as(RunDir(found.folder), "mlflow"))
    spec = parse_comparison(
        {
            **_request(what, None, None, None, folds, None, None, settings),
            "methods": list(methods),
            "models": list(models),
            "arms": [{"name": arm, "set": dict(changes)} for arm, changes in (arms or {}).items()],
            "seeds": seeds,
            "margin": margin,
            "budget_seconds": budget_seconds,
        }
    )
    place = _workspace(workspace)
    gathered = followed(choose(trackers), place, experiment or experiment_name(spec.job))
    with gathered as begun, progress_bars(shown=progress) as update:
        shared = Shared.of(place, Slots.of("local", slots) if slots > 1 else None)
        found = run_comparison(spec, shared, update, out, begun)
    return replace(found, mlflow_run_id=tracked_as(RunDir(found.folder), "mlflow"))


@explains_keywords
@worded_for(for_python)
def check(
    data: str | Path,
    *,
    method: str | None = None,
    model: str | None = None,
    folds: int | None = None,
    settings: Mapping[str, Any] | None = None,
    quick: bool = False,
    fix: str | Path | None = None,
    workspace: str | Path | None = None,
    progress: bool = True,
) -> Plan:
    """Examine the images, and return the findings with the plan of what `train` would do with these arguments. Trains nothing.

    The examination looks for copies, labels that are probably wrong, shortcuts, and images that are blank, dark or blurred. It is
    the `examined` of the result; its `page` shows the findings with pictures.

    Args:
        quick: leave the examination out.
        fix: write the proposed corrections to this CSV file, for ``settings={"data.manifest": …}``. Images are not changed.

    Raises:
        FinetuneError: the data or the request cannot be used; the message says what to do.
    """
    from finetune.runs.shared import Shared
    from finetune.studies.examination import data_problems, examine_request
    from finetune.studies.plan import plan

    if quick and fix is not None:
        raise InvalidInput("fix writes the corrections that an examination proposes, and quick leaves it out; give one of them")
    spec, shared = _spec(data, method, model, None, folds, None, None, settings), Shared.of(_workspace(workspace))
    with progress_bars(shown=progress) as update, data_problems(shared, update):
        planned = plan(spec, shared, update)
        if quick:
            return planned
        command = f"finetune check {shlex.quote(spec.training_file)}"
        examined = examine_request(spec, shared, update, fix=None if fix is None else Path(fix), command=command)
        return replace(planned, examined=examined)


@explains_keywords
@worded_for(for_python)
def suggest(
    pictures: str | Path | Sequence[str | Path],
    model: str | Path,
    n: int = 50,
    *,
    labelled: str | Path | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    workspace: str | Path | None = None,
    progress: bool = True,
) -> Suggestions:
    """Choose the unlabelled images that are most informative for a model: uncertain ones that differ from one another.

    Args:
        pictures: folders, files and glob patterns.
        model: as for `load`.
        n: number of images to choose.
        labelled: data with labels, in any supported format; near duplicates of its images are not suggested.
        out: a folder for the table, the page and the import for Label Studio; by default nothing is written.

    Raises:
        FinetuneError: there is no such model, or no image to suggest; the message says what to do.
    """
    from finetune.labelling.page import write_suggestions
    from finetune.labelling.suggest import suggest as choose

    folders = [pictures] if isinstance(pictures, str | Path) else pictures
    bundle = Registry(_workspace(workspace).models).locate(str(model))
    with progress_bars(shown=progress) as update:
        found = choose(bundle, [Path(one) for one in folders], n, labelled=labelled, seed=seed, progress=update)
    if out is not None:
        write_suggestions(Path(out), found)
    return found


@explains_keywords
@worded_for(for_python)
def load(reference: str | Path, *, workspace: str | Path | None = None) -> Model:
    """Load a model by ``name``, ``name@version``, ``name@alias``, or the folder of a bundle.

    Raises:
        NotFound: there is no such model; the message names those that exist.
    """
    return Model(Registry(_workspace(workspace).models).locate(str(reference)))


def _workspace(given: str | Path | None) -> Workspace:
    from_environment = Workspace.from_environment()
    return from_environment if given is None else Workspace.at(Path(given), from_environment.networks)


def _spec(*arguments: Any) -> JobSpec:
    return parse_spec(_request(*arguments))


def _request(
    data: str | Path,
    method: str | None,
    model: str | None,
    epochs: int | None,
    folds: int | None,
    seed: int | None,
    name: str | None,
    settings: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the arguments as a mapping for `parse_spec`."""
    given: dict[str, Any] = {
        "training_file": str(data),
        "method": method,
        "model": None if model is None else {"backbone": model},
        "hyperparameters": None if epochs is None else {"n_epochs": epochs},
        "data": None if folds is None else {"folds": folds},
        "seed": seed,
        "suffix": name,
    }
    return merged_mapping(None, {key: value for key, value in given.items() if value is not None}, values=settings)
