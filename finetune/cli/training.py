"""`check`, `train`, `evaluate` and `backbones`: the commands for training."""

from __future__ import annotations

import functools
import json
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.executing import pop_slots, slots_options
from finetune.cli.following import pop_trackers, tracking_options
from finetune.runtime.collector import objects_exempt

if TYPE_CHECKING:
    from finetune.spec import JobSpec


def note_settings_without_effect(spec: JobSpec) -> None:
    """Print a note about settings that the method of the spec ignores."""
    if ignored := spec.without_effect():
        names, verb = ", ".join(ignored), "has" if len(ignored) == 1 else "have"
        click.echo(
            f"note: {names} {verb} no effect with linear_probe, which takes no optimiser steps (--method full does)", err=True
        )


NO_DATA = (
    "No data was given. Give a folder with one folder of images per class, an archive of one, a table of file names and labels, "
    "or a spec file (.yaml, .json), for example: finetune train photos"
)
METHOD_NAMES = ("linear_probe", "partial", "full", "gradual", "auto")


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add flags for the most frequent fields of a job spec to a command, and ``--set`` for all others."""
    for decorate in reversed(
        [
            click.option("--data", metavar="DATA", help="Labelled images: a folder, archive, table or URL (training_file)."),
            click.option("--validation", metavar="DATA", help="Separate images for validation (validation_file)."),
            click.option("--test", metavar="DATA", help="Separate images for the final test (test_file)."),
            click.option("--name", help="Name of the registered model (suffix). Default: the name of the data."),
            click.option(
                "--model",
                metavar="BACKBONE",
                help="A timm model (finetune backbones lists them), or a model of your own: flowers@3.",
            ),
            click.option("--method", help=f"What trains: {' | '.join(METHOD_NAMES)}. Default: linear_probe."),
            click.option(
                "--epochs", type=int, help="Number of epochs, for all methods but linear_probe (hyperparameters.n_epochs)."
            ),
            click.option(
                "--folds", type=int, help="Cross-validate with this number of folds, then train on all images (data.folds)."
            ),
            click.option("--seed", type=int, help="Random seed of training. The split has its own, data.split_seed."),
            click.option(
                "--set",
                "settings",
                multiple=True,
                metavar="KEY.PATH=VALUE",
                help="Any other setting, such as data.val_fraction=0.2; repeatable. `finetune spec` lists all of them.",
            ),
        ]
    ):
        command = decorate(command)
    return command


def pop_job_options(given: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Pop the values of `job_options` from a command's arguments; return overrides of the spec, and ``--set`` settings."""
    short_forms: dict[str, Any] = {
        "training_file": given.pop("data"),
        "validation_file": given.pop("validation"),
        "test_file": given.pop("test"),
        "suffix": given.pop("name"),
        "seed": given.pop("seed"),
    }
    overrides = {key: value for key, value in short_forms.items() if value is not None}
    if (model := given.pop("model")) is not None:
        overrides["model"] = {"backbone": model}
    if (method := given.pop("method", None)) is not None:
        overrides["method"] = method
    if (folds := given.pop("folds")) is not None:
        overrides["data"] = {"folds": folds}
    if (epochs := given.pop("epochs")) is not None:
        overrides["hyperparameters"] = {"n_epochs": epochs}
    return overrides, given.pop("settings")


def names_data(overrides: Mapping[str, Any], settings: Sequence[str]) -> bool:
    """Return whether the data is given, by its option or with ``--set``."""
    return "training_file" in overrides or any(setting.startswith("training_file=") for setting in settings)


def is_spec_file(path: Path) -> bool:
    """Return whether a file is a request and not data: YAML, or a JSON object without the ``images`` of a COCO file."""
    if path.suffix.lower() in (".yaml", ".yml"):
        return True
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(content, dict) and "images" not in content


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add a spec file or data as argument, `job_options` and ``--set`` to a command, which is called with a valid `spec`."""

    def build(ctx: click.Context, **given: Any) -> Any:
        from finetune.spec import load_spec

        overrides, settings = pop_job_options(given)
        what: str | None = given.pop("what")
        spec_file = Path(what) if what is not None and is_spec_file(Path(what)) else None
        if what is not None and spec_file is None:
            if "training_file" in overrides:
                raise click.UsageError(f"the data is given twice: {what} and --data {overrides['training_file']}")
            overrides["training_file"] = what
        if spec_file is None and not names_data(overrides, settings):
            raise click.UsageError(NO_DATA)
        return ctx.invoke(command, spec=load_spec(spec_file, overrides, settings), **given)

    functools.update_wrapper(build, command)  # keeps the options that `command` already has
    decorated: Callable[..., Any] = job_options(click.pass_context(build))
    return click.argument("what", required=False, metavar="[SPEC.yaml|DATA]")(decorated)


reading_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="data.KEY=VALUE",
    help="How the data is read, such as data.label_column=species; repeatable. `finetune spec data` lists the settings.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document on stdout.")


@click.command()
@spec_options
@click.option("--quick", is_flag=True, help="Only show the plan; do not search for copies, wrong labels and shortcuts.")
@click.option(
    "--fix",
    type=click.Path(path_type=Path),
    metavar="FILE.csv",
    help="Write the proposed corrections to a CSV file. Images are not changed.",
)
@click.option(
    "--acknowledge", multiple=True, metavar="KIND|KEY", help="Accept these findings: they are not reported again. Repeatable."
)
@click.option("--reopen", multiple=True, metavar="KIND|KEY", help="Report accepted findings again; repeatable.")
@click.option(
    "--page",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Where to write the page with pictures. Default: in the workspace.",
)
@click.option("--run-dir", type=click.Path(path_type=Path), hidden=True, help="A worker's: the examination alone, into it.")
@json_option
def check(
    spec: JobSpec,
    quick: bool,
    fix: Path | None,
    acknowledge: tuple[str, ...],
    reopen: tuple[str, ...],
    page: Path | None,
    run_dir: Path | None,
    as_json: bool,
) -> None:
    """Examine the images and show the training plan.

    Nothing is trained. Reported are unreadable files, copies of an image within and across splits or with different labels,
    labels that are probably wrong, labels that can be predicted from a file's size, name or camera alone, small classes, and
    blank, dark or blurred images. The plan shows the settings, the stages that would train, and estimates of time and memory.

    \b
    finetune check photos
    finetune check photos --method full --quick     only the plan of a method
    finetune check photos --fix corrected.csv       then train with:
    finetune train photos --set data.manifest=corrected.csv
    finetune check photos --acknowledge label_errors
    """
    if quick and (fix or acknowledge or reopen or page):
        raise click.UsageError(
            "--quick omits the examination, so it cannot be combined with --fix, --acknowledge, --reopen or --page"
        )
    with objects_exempt():
        from finetune.cli.examining import carry_out, show_examination
        from finetune.cli.show_plan import show_plan
        from finetune.cli.terminal import print_json
        from finetune.progress_bars import progress_bars
        from finetune.runs.shared import Shared
        from finetune.storage.workspace import Workspace
        from finetune.studies.examination import data_problems, examine_request
        from finetune.studies.plan import plan

    shared = Shared.of(Workspace.from_environment())
    if run_dir is not None:
        print_json(carry_out(spec, run_dir, shared))
        return
    note_settings_without_effect(spec)
    with progress_bars(shown=not as_json) as progress, data_problems(shared, progress):
        document = plan(spec, shared, progress).to_dict()
        found = None
        if not quick:
            command = f"finetune check {shlex.quote(spec.training_file)}"
            found = examine_request(
                spec, shared, progress, accept=acknowledge, reopened=reopen, page=page, fix=fix, command=command
            )
    if as_json:
        print_json({**document, "examination": None if found is None else found.to_dict()})
    else:
        show_plan(document, None if found is None else found.examination)
        if found is not None:
            show_examination(found)


@click.command()
@spec_options
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Folder of the run; an unfinished run in it is resumed. Default: in the workspace.",
)
@slots_options
@tracking_options
@json_option
def train(spec: JobSpec, run_dir: Path | None, as_json: bool, **given: Any) -> None:
    """Fine-tune, evaluate, export and register a model.

    By default the head is trained on the frozen backbone (linear_probe). If a run is interrupted, by Ctrl-C or a crash, the
    same command resumes it. At the end, the metrics on the test images, the costs and the diagnosis are printed.

    \b
    finetune train photos
    finetune train photos --method partial --set method.stages=2
    finetune train photos --method full --model resnet50 --epochs 10
    finetune train photos --folds 5              cross-validate: few images
    finetune train labels.csv --set data.label_column=species
    finetune train job.yaml --seed 1             a spec file; options override
    """
    from finetune.jobs.lease import watch_lease_from_environment

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as for Ctrl-C, wherever the run is
    watch_lease_from_environment()
    note_settings_without_effect(spec)
    with objects_exempt():
        from finetune.bundle.registry import Registry
        from finetune.cli.show_run import show_outcome
        from finetune.cli.terminal import print_json
        from finetune.progress_bars import progress_bars
        from finetune.runs.shared import Shared
        from finetune.storage.rundir import RunDir
        from finetune.storage.workspace import Workspace
        from finetune.studies.carry_out import fine_tune

    workspace, slots, trackers = Workspace.from_environment(), pop_slots(given), pop_trackers(given)
    with trackers.follow(workspace, spec) as begun, progress_bars(shown=not as_json) as progress:
        outcome = fine_tune(spec, Shared.of(workspace, slots), progress, run_dir, begun)
    print_json(outcome.to_dict()) if as_json else show_outcome(outcome, RunDir(outcome.run), Registry(workspace.models))


@click.command()
@click.argument("model")
@click.option("--data", required=True, metavar="DATA", help="Labelled images: a folder, archive, table or URL.")
@click.option("--split", help="Which split of data that has splits. Default: test, else val, else all images.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the prediction for each image to a .csv, .parquet or .npz file.",
)
@reading_option
@json_option
def evaluate(model: str, data: str, settings: tuple[str, ...], split: str | None, out: Path | None, as_json: bool) -> None:
    """Evaluate MODEL on labelled images.

    MODEL is a registered name, name@version, name@alias, or a bundle folder. If the model was trained on some of the images,
    their number is printed, and the metrics are also computed without them.

    \b
    finetune evaluate photos --data more-photos
    finetune evaluate photos@3 --data other.zip --out predictions.csv
    """
    from finetune.bundle.registry import Registry
    from finetune.cli.show_evaluation import show_evaluation
    from finetune.cli.terminal import print_json
    from finetune.data.reading import reading_of
    from finetune.evaluation.of_bundle import evaluate_bundle
    from finetune.evaluation.tables import check_ending, write_table
    from finetune.progress_bars import progress_bars
    from finetune.spec import load_spec
    from finetune.storage.store import Store
    from finetune.storage.workspace import Workspace

    if out is not None:
        check_ending(out)
    workspace = Workspace.from_environment()
    spec = load_spec(None, {"training_file": data}, settings)
    folder = Registry(workspace.models).locate(model)
    with progress_bars(shown=not as_json) as progress:
        found = evaluate_bundle(folder, data, split, progress, reading_of(spec.data, Store(workspace.cache)))
    if out is not None:
        write_table(out, found.predictions, found.temperature)
    print_json(found.to_dict()) if as_json else show_evaluation(found)


@click.command()
@click.argument("name", required=False)
@click.option("--limit", default=40, show_default=True, help="Maximum number of names to list.")
@json_option
def backbones(name: str | None, limit: int, as_json: bool) -> None:
    """List backbones, or show the stages of one.

    NAME is the name of a timm model or a pattern. With a name, its stages are shown, and which of them each method trains.
    Without NAME, the smallest model of each architecture family is listed, with the result of a test of all features.

    \b
    finetune backbones resnet50       stages, parameters, what each method trains
    finetune backbones 'vgg*'         names that match
    """
    from finetune.cli.show_backbones import show_backbone, show_backbone_names, show_trials
    from finetune.cli.terminal import print_json
    from finetune.model.catalog import list_backbones
    from finetune.model.describe import describe_backbone
    from finetune.model.tried import read_trials

    if name is None and not as_json:
        show_trials(read_trials(), len(list_backbones()))
    elif name is None or any(sign in name for sign in "*?["):
        names = list_backbones(name or "*")
        print_json({"backbones": names}) if as_json else show_backbone_names(names, limit)
    else:
        description = describe_backbone(name)
        print_json(description) if as_json else show_backbone(description)
