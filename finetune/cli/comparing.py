"""`compare`: train in several ways on the same images and compare the results."""

from __future__ import annotations

import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from finetune.cli.executing import pop_slots, slots_options
from finetune.cli.following import pop_trackers, tracking_options
from finetune.cli.training import NO_DATA, is_spec_file, job_options, json_option, names_data, pop_job_options
from finetune.runtime.collector import objects_exempt


@click.command()
@click.argument("what", nargs=-1, metavar="[DATA | SPEC.yaml | RUN RUN… | COMPARISON]", type=click.Path(path_type=Path))
@job_options
@click.option("--methods", help="Methods to compare, separated by commas. Default: linear_probe,partial,full.")
@click.option("--models", help="Backbones to compare, separated by commas; each is combined with each method.")
@click.option(
    "--arm",
    "arms",
    multiple=True,
    metavar="NAME:KEY=VALUE,…",
    help="Another arm to compare, defined by its settings; repeatable (arms).",
)
@click.option("--seeds", type=int, help="Number of runs of each arm, with different seeds. Default: 3.")
@click.option("--margin", type=float, help="The largest difference that does not matter. Default: 0.01, one point.")
@click.option(
    "--budget", metavar="DURATION", help="Approximate time limit, such as 20m or 2h; the cheapest arms are trained first."
)
@click.option("--no-register", is_flag=True, help="Do not register the best run of the chosen arm as a model.")
@slots_options
@click.option("--run-dir", type=click.Path(path_type=Path), help="Folder of the comparison; an unfinished one in it is resumed.")
@click.option(
    "--server",
    metavar="URL",
    help="Run the comparison on a server and show its progress here; the key is read from FINETUNE_API_KEY.",
)
@click.option(
    "--detach", is_flag=True, help="Queue the comparison, on --server or for this workspace's worker, print its id and exit."
)
@tracking_options
@json_option
def compare(what: tuple[Path, ...], run_dir: Path | None, server: str | None, detach: bool, as_json: bool, **given: Any) -> None:
    """Train in several ways on the same images and compare.

    Each way to train is called an arm. By default the arms are the methods linear_probe, partial and full, each trained with
    three seeds. The result is a recommendation with paired tests on the test images, 95 % intervals and costs, and a page.

    Instead of DATA, give a spec file; two or more folders of finished runs, which are compared without training (with --server,
    the ids of finished jobs); the id of a queued comparison, to follow it; or the folder of a finished one, to show it again.

    \b
    finetune compare photos
    finetune compare photos --methods linear_probe,full --seeds 5
    finetune compare photos --models resnet18,resnet50 --methods linear_probe
    finetune compare photos --arm light:augmentation=light \\
                            --arm strong:augmentation=strong
    finetune compare photos --budget 20m
    finetune compare .finetune/runs/photos-full-… .finetune/runs/photos-partial-…
    finetune compare photos --server http://gpu-box:3000
    """
    if server is not None or detach or _is_queued_comparison(what):
        _in_the_queue(what, server, detach, as_json, run_dir, given)
        return
    from finetune.jobs.lease import watch_lease_from_environment

    with objects_exempt():
        from finetune.cli.show_comparison import show_comparison
        from finetune.cli.terminal import print_json, shortened
        from finetune.comparison_spec import ComparedRuns, load_request
        from finetune.progress_bars import console, progress_bars
        from finetune.runs.shared import Shared
        from finetune.storage.files import read_json
        from finetune.storage.rundir import RunDir
        from finetune.storage.workspace import Workspace
        from finetune.studies.compare import compare as run_comparison
        from finetune.studies.compare import compare_runs, finished_before
        from finetune.studies.compare.result import Comparison
        from finetune.tracking.mirror import tracked_as

    watch_lease_from_environment()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as for Ctrl-C, wherever the comparison is
    workspace = Workspace.from_environment()
    slots, trackers = pop_slots(given), pop_trackers(given)
    if len(what) == 1 and (finished := RunDir(what[0].absolute()).comparison).exists():
        document = Comparison.from_dict(read_json(finished)).to_dict()
        print_json(document) if as_json else show_comparison(document, shortened(Path(document["report"])))
        return

    def begins(run: RunDir) -> None:
        begun(run)
        if not as_json and (earlier := finished_before(run)) is not None:
            console.print(
                f"These arms were compared on this data before, and are trained again now. The earlier result: "
                f"finetune compare {shlex.quote(shortened(earlier.root))}",
                markup=False,
            )

    asked = load_request(*_request(what, given))
    if isinstance(asked, ComparedRuns):
        found = compare_runs([Path(run) for run in asked.runs], workspace, asked.margin, run_dir)
        with trackers.follow(workspace, found.dataset) as begun:
            begun(RunDir(found.folder))
    else:
        with trackers.follow(workspace, asked.job) as begun, progress_bars(shown=not as_json) as progress:
            found = run_comparison(asked, Shared.of(workspace, slots), progress, run_dir, begins)
    found = replace(found, mlflow_run_id=tracked_as(RunDir(found.folder), "mlflow"))
    print_json(found.to_dict()) if as_json else show_comparison(found.to_dict(), shortened(found.report))


def _is_queued_comparison(what: tuple[Path, ...]) -> bool:
    from finetune.jobs.kinds import COMPARISON

    return len(what) == 1 and str(what[0]).startswith(f"{COMPARISON.prefix}-") and not what[0].exists()


def _in_the_queue(
    what: tuple[Path, ...], server: str | None, detach: bool, as_json: bool, run_dir: Path | None, given: dict[str, Any]
) -> None:
    """Queue a comparison or find a queued one, follow it to its end and show its result."""
    from finetune.cli.follow import follow
    from finetune.cli.jobs import EXIT_CODES, client_of
    from finetune.cli.show_comparison import show_comparison
    from finetune.cli.terminal import print_json, shortened
    from finetune.comparison_spec import load_request
    from finetune.progress_bars import console, progress_bars

    tracked = [given.pop(name) for name in ("no_mlflow", "trackers", "experiment")]
    if run_dir is not None or pop_slots(given) is not None or any(tracked):
        raise click.UsageError(
            "--run-dir, --slots, --executor and the tracking options cannot be combined with --server, --detach or a queued "
            "comparison, which is run by a worker with the worker's settings"
        )
    client = client_of(server)
    if _is_queued_comparison(what):
        job = client.get(str(what[0]))
    else:
        asked = load_request(*_request(what, given))
        with progress_bars(shown=not as_json) as progress:
            job = client.submit(asked, progress=progress)
        if not as_json:
            console.print(f"comparison {job.id}", markup=False)
    if detach:
        print_json(job.to_dict()) if as_json else click.echo(job.id)
        return
    job = follow(client, job, shown=not as_json)
    if job.state != "succeeded":
        if as_json:
            print_json(job.to_dict())
        sys.exit(EXIT_CODES[job.state])
    found = client.result(job.id)
    report = f"{server.rstrip('/')}{found['report']}" if server is not None else shortened(Path(found["report"]))
    print_json(found) if as_json else show_comparison(found, report)


def _request(what: tuple[Path, ...], given: dict[str, Any]) -> tuple[Path | None, dict[str, Any], tuple[str, ...]]:
    """Return the spec file, the overrides of its values, and the settings.

    Two or more arguments, or a single one that is the folder of a finished run, are runs to compare.
    """
    margin = given.pop("margin")
    if len(what) > 1 or (len(what) == 1 and (what[0] / "outcome.json").exists()):
        return None, {"runs": [str(run) for run in what], **({} if margin is None else {"margin": margin})}, ()
    path = what[0] if what else None
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
    if given["method"] is not None and not (own["models"] or own["arms"]):
        other = "full" if given["method"] == "linear_probe" else "linear_probe"
        raise click.UsageError(
            "--method sets one method for all arms that --models and --arm define. To compare methods, use --methods, as in: "
            f"--methods {given['method']},{other}"
        )
    overrides, settings = pop_job_options(given)
    spec_file = path if path is not None and is_spec_file(path) else None
    if path is not None and spec_file is None:
        overrides["training_file"] = str(path)
    if spec_file is None and not names_data(overrides, settings):
        raise click.UsageError(NO_DATA)
    return spec_file, {**overrides, **{key: value for key, value in own.items() if value is not None}}, settings


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _arm(text: str) -> dict[str, Any]:
    """Parse an arm such as ``strong:augmentation=strong,hyperparameters.n_epochs=5``."""
    import yaml

    name, colon, changes = text.partition(":")
    pairs = [pair.partition("=") for pair in changes.split(",") if pair.strip()]
    if not colon or not name.strip() or any(not equals for _, equals, _ in pairs):
        raise click.BadParameter(
            f"{text!r}: expected NAME:KEY=VALUE or NAME:KEY=VALUE,KEY=VALUE, such as strong:augmentation=strong",
            param_hint="--arm",
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
        raise click.BadParameter(f"{text!r}: a budget must be greater than 0, such as 20m", param_hint="--budget")
    return value
