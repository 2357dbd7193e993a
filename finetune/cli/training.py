"""`check`, `train`, `evaluate` and `backbones`: the commands for training."""

from __future__ import annotations

import functools
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.executing import places_options, take_places
from finetune.cli.following import take_trackers, tracking_options
from finetune.runtime.collector import objects_exempt

if TYPE_CHECKING:
    from finetune.spec import JobSpec

NO_DATA = "no data was given: name a folder of labelled images, an archive of one, a table that names images, or a spec file"
METHOD_NAMES = ("linear_probe", "partial", "full", "gradual", "auto")


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add flags for the most frequent fields of a job spec to a command, and ``--set`` for all others."""
    for decorate in reversed(
        [
            click.option("--data", metavar="DATA", help="Labelled images: a folder, archive, table or address (training_file)."),
            click.option("--validation", metavar="DATA", help="Labelled images to validate on (validation_file)."),
            click.option("--test", metavar="DATA", help="Labelled images to test on once, at the end (test_file)."),
            click.option("--name", help="Name of the registered model (suffix)."),
            click.option(
                "--model", metavar="BACKBONE", help="A timm name (see finetune backbones), or your own model: flowers@3."
            ),
            click.option("--method", help=f"{' | '.join(METHOD_NAMES)}."),
            click.option("--epochs", type=int, help="Epochs of training (hyperparameters.n_epochs)."),
            click.option("--folds", type=int, help="Cross-validate with so many folds, then train on all images (data.folds)."),
            click.option("--seed", type=int, help="Of training; the split has data.split_seed."),
            click.option(
                "--set", "settings", multiple=True, metavar="KEY.PATH=VALUE", help="Any other field of the spec; repeatable."
            ),
        ]
    ):
        command = decorate(command)
    return command


def take_job_options(given: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
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


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add a spec file or data as argument, `job_options` and ``--set`` to a command; it gets one validated `spec`."""

    def build(ctx: click.Context, **given: Any) -> Any:
        from finetune.spec import load_spec

        overrides, settings = take_job_options(given)
        what: str | None = given.pop("what")
        spec_file = Path(what) if what is not None and what.lower().endswith((".yaml", ".yml")) else None
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
    help="How the data is read, such as data.label_column=species; repeatable.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


@click.command()
@spec_options
@click.option("--quick", is_flag=True, help="The plan alone; copies, labels and shortcuts are not looked for.")
@click.option(
    "--fix", type=click.Path(path_type=Path), metavar="FILE.csv", help="Write a corrected manifest; no image is touched."
)
@click.option("--acknowledge", multiple=True, metavar="KIND|KEY", help="Never report these cases again; repeatable.")
@click.option("--reopen", multiple=True, metavar="KIND|KEY", help="Report acknowledged cases again; repeatable.")
@click.option("--page", type=click.Path(path_type=Path), metavar="FILE.html", help="Where the page with pictures is written.")
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
    """Examine the data and show the plan. Nothing is trained.

    What is wrong with the data: unreadable files, copies within and across splits and under several labels, labels that are
    probably wrong, labels that a file's size, name or camera gives away, small classes, pictures of nothing. Then what would
    train, and what it would take.
    """
    if quick and (fix or acknowledge or reopen or page):
        raise click.UsageError("--quick leaves the examination out, which --fix, --acknowledge, --reopen and --page are about")
    with objects_exempt():
        from finetune.cli.examining import carry_out, data_problems, show_examination
        from finetune.cli.show import show_plan
        from finetune.cli.terminal import print_json
        from finetune.progress_bars import progress_bars
        from finetune.runs.shared import Shared
        from finetune.storage.workspace import Workspace
        from finetune.studies.examination import examine_request
        from finetune.studies.plan import plan

    shared = Shared.of(Workspace.from_environment())
    if run_dir is not None:
        print_json(carry_out(spec, run_dir, shared))
        return
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
        show_plan(document)
        if found is not None:
            show_examination(found)


@click.command()
@spec_options
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the run writes; an unfinished run there is resumed.")
@places_options
@tracking_options
@json_option
def train(spec: JobSpec, run_dir: Path | None, as_json: bool, **given: Any) -> None:
    """Fine-tune, evaluate, export and register a model.

    The same command after a crash or Ctrl-C goes on where the run stopped. With --folds and --slots, folds go on side by side.
    """
    from finetune.jobs.lease import watch_lease_from_environment

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as for Ctrl-C, wherever the run is
    watch_lease_from_environment()
    with objects_exempt():
        from finetune.cli.show import show_outcome
        from finetune.cli.terminal import print_json
        from finetune.progress_bars import progress_bars
        from finetune.runs.shared import Shared
        from finetune.storage.rundir import RunDir
        from finetune.storage.workspace import Workspace
        from finetune.studies.carry_out import fine_tune
        from finetune.tracking.view import experiment_name

    workspace, places, trackers = Workspace.from_environment(), take_places(given), take_trackers(given)
    with trackers.follow(workspace, experiment_name(spec)) as begun, progress_bars(shown=not as_json) as progress:
        outcome = fine_tune(spec, Shared.of(workspace, places), progress, run_dir, begun)
    print_json(outcome.to_dict()) if as_json else show_outcome(outcome, RunDir(outcome.run))


@click.command()
@click.argument("model")
@click.option("--data", required=True, metavar="DATA", help="A folder, archive, table or address of labelled images.")
@click.option("--split", help="Which part, where the data has train, val and test (default test, else val, else all).")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write every answer: .csv, .parquet or .npz.")
@reading_option
@json_option
def evaluate(model: str, data: str, settings: tuple[str, ...], split: str | None, out: Path | None, as_json: bool) -> None:
    """Evaluate MODEL on labelled images.

    MODEL is a registered name, name@version, or a bundle folder. Images that the model was trained on are counted, and the
    metrics without them are shown too.
    """
    from finetune.bundle.registry import Registry
    from finetune.cli.show import show_evaluation
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
@click.option("--limit", default=40, show_default=True, help="How many names to list.")
@json_option
def backbones(name: str | None, limit: int, as_json: bool) -> None:
    """List backbones, or show the stages of one. With one name, also what each method would train.

    NAME is a timm name (resnet50) or a pattern (resnet*). Without it, the smallest member of each tested family is listed with
    the result of its test.
    """
    from finetune.cli.show import show_backbone, show_backbone_names, show_trials
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
