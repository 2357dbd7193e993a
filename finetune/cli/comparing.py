"""`compare`: several ways to train on the same images, and the verdict."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from finetune.cli.executing import places_options, take_places
from finetune.cli.following import take_trackers, tracking_options
from finetune.cli.training import job_options, json_option, take_job_options
from finetune.runtime.collector import objects_exempt


@click.command()
@click.argument("what", nargs=-1, metavar="[DATA | SPEC.yaml | RUN RUN…]", type=click.Path(path_type=Path))
@job_options
@click.option("--methods", help="Arms, separated by commas (default linear_probe,partial,full).")
@click.option("--models", help="Arms by backbone, separated by commas; times the methods.")
@click.option("--arm", "arms", multiple=True, metavar="NAME:KEY=VALUE,…", help="An arm by its settings; repeatable (arms).")
@click.option("--seeds", type=int, help="Runs of each arm (default 3).")
@click.option("--margin", type=float, help="A difference that does not matter (default 0.01, one point).")
@click.option("--budget", metavar="DURATION", help="About how long it may take, such as 20m or 2h: what fits, cheapest first.")
@click.option("--no-register", is_flag=True, help="Do not register the chosen arm's best run.")
@places_options
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the comparison writes; an unfinished one is resumed.")
@tracking_options
@json_option
def compare(what: tuple[Path, ...], run_dir: Path | None, as_json: bool, **given: Any) -> None:
    """Train in several ways on the same images and compare them.

    WHAT is the data, a spec file, or the folders of two or more finished runs, which are then compared as they are.

    By default the arms are linear_probe, partial and full, with three seeds each. Others, for example:

    \b
    finetune compare photos --methods linear_probe,full --seeds 5
    finetune compare photos --models resnet18,resnet50 --methods linear_probe
    finetune compare photos --arm light:augmentation=light \\
                            --arm strong:augmentation=strong
    finetune compare .finetune/runs/photos-full-… .finetune/runs/photos-partial-…
    """
    from finetune.jobs.lease import watch_lease_from_environment

    with objects_exempt():
        from finetune.cli.show import show_comparison
        from finetune.cli.terminal import print_json
        from finetune.comparison_spec import load_comparison
        from finetune.progress_bars import progress_bars
        from finetune.runs.build import Shared
        from finetune.storage.rundir import RunDir
        from finetune.storage.workspace import Workspace
        from finetune.studies.compare import compare as run_comparison
        from finetune.studies.compare import compare_runs
        from finetune.tracking.mirror import tracked_as
        from finetune.tracking.view import experiment_name

    watch_lease_from_environment()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as for Ctrl-C, wherever the comparison is
    workspace = Workspace.from_environment()
    margin, places = given.pop("margin"), take_places(given)
    trackers = take_trackers(given)
    if len(what) > 1 or (len(what) == 1 and (what[0] / "outcome.json").exists()):
        found = compare_runs(what, workspace, **({"margin": margin} if margin is not None else {}), out=run_dir)
        with trackers.follow(workspace, found.dataset) as begun:
            begun(RunDir(found.folder))
    else:
        spec = load_comparison(*_request(what[0] if what else None, margin, given))
        with trackers.follow(workspace, experiment_name(spec.job)) as begun, progress_bars(shown=not as_json) as progress:
            found = run_comparison(spec, Shared.of(workspace, places), progress, run_dir, begun)
    found = replace(found, mlflow_run_id=tracked_as(RunDir(found.folder), "mlflow"))
    print_json(found.to_dict()) if as_json else show_comparison(found)


def _request(
    what: Path | None, margin: float | None, given: dict[str, Any]
) -> tuple[Path | None, dict[str, Any], tuple[str, ...]]:
    """Return the spec file, what is laid over it, and the settings."""
    budget, no_register = given.pop("budget"), given.pop("no_register")
    own: dict[str, Any] = {
        "methods": _split(given.pop("methods")),
        "models": _split(given.pop("models")),
        "arms": [_arm(text) for text in given.pop("arms")] or None,
        "seeds": given.pop("seeds"),
        "margin": margin,
        "budget_seconds": None if budget is None else _seconds(budget),
        "register_chosen": False if no_register else None,
    }
    overrides, settings = take_job_options(given)
    spec_file = what if what is not None and what.suffix.lower() in (".yaml", ".yml", ".json") else None
    if what is not None and spec_file is None:
        overrides["training_file"] = str(what)
    return spec_file, {**overrides, **{key: value for key, value in own.items() if value is not None}}, settings


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _arm(text: str) -> dict[str, Any]:
    """``strong:augmentation=strong,hyperparameters.n_epochs=5`` as an arm."""
    import yaml

    name, colon, changes = text.partition(":")
    pairs = [pair.partition("=") for pair in changes.split(",") if pair.strip()]
    if not colon or not name.strip() or any(not equals for _, equals, _ in pairs):
        raise click.BadParameter(
            f"{text!r}: expected NAME:KEY=VALUE,KEY=VALUE, such as strong:augmentation=strong", param_hint="--arm"
        )
    return {"name": name.strip(), "set": {key.strip(): yaml.safe_load(value) for key, _, value in pairs}}


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        value = float(number) * units[unit]
    except ValueError:
        raise click.BadParameter(f"{text!r}: expected a duration such as 90s, 20m or 2h", param_hint="--budget") from None
    if value <= 0:
        raise click.BadParameter(f"{text!r}: a budget is more than nothing", param_hint="--budget")
    return value
